/* Completion events: who gets them, that a destroy waits until they are acknowledged, and posting errors. */
#include "pair.h"
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

static void send_one(struct pair *p, uint64_t wr_id)
{
	struct ibv_sge sge = { (uintptr_t)p->buffer, 64, p->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad = NULL;
	post_receive(p, wr_id, 0, 64);
	CHECK(ibv_post_send(p->qp[0], &wr, &bad) == 0);
	expect(p->cq, wr_id, IBV_WC_SEND);
}

static atomic_int acknowledged;

static void *destroy(void *cq)
{
	CHECK(ibv_destroy_cq(cq) == 0);
	CHECK(atomic_load(&acknowledged) == 1);
	return NULL;
}

static void event(struct pair *p)
{
	struct ibv_cq *cq;
	void *cq_context;
	int flags = fcntl(p->channel->fd, F_GETFL);
	CHECK(fcntl(p->channel->fd, F_SETFL, flags | O_NONBLOCK) == 0);
	errno = 0;
	CHECK(ibv_get_cq_event(p->channel, &cq, &cq_context) == -1 && errno == EAGAIN);
	CHECK(fcntl(p->channel->fd, F_SETFL, flags) == 0);

	CHECK(ibv_req_notify_cq(p->rcq, 0) == 0);
	strcpy(p->buffer, "hello");
	send_one(p, 1);
	CHECK(ibv_get_cq_event(p->channel, &cq, &cq_context) == 0);
	CHECK(cq == p->rcq && cq_context == cq->cq_context);
	expect(p->rcq, 1, IBV_WC_RECV);
	CHECK(!strcmp(p->buffer + SIZE, "hello"));
}

static void refusals(struct pair *p)
{
	struct ibv_sge sge[5] = { { (uintptr_t)p->buffer, 8, p->mr->lkey } };
	struct ibv_send_wr wr[2] = { { .wr_id = 1, .next = &wr[1], .sg_list = sge, .num_sge = 1, .opcode = IBV_WR_SEND },
				     { .wr_id = 2, .sg_list = sge, .num_sge = 5, .opcode = IBV_WR_SEND } };
	struct ibv_send_wr *bad = NULL;
	post_receive(p, 7, 0, 64);
	CHECK(ibv_post_send(p->qp[0], wr, &bad) == EINVAL && bad == &wr[1]); /* more entries than the QP has */
	expect(p->rcq, 7, IBV_WC_RECV);                                      /* the first was posted */
	wr[1].num_sge = 1;
	wr[1].opcode = IBV_WR_TSO;
	CHECK(ibv_post_send(p->qp[0], &wr[1], &bad) != 0 && bad == &wr[1]);
	wr[1].opcode = 99;
	CHECK(ibv_post_send(p->qp[0], &wr[1], &bad) == EINVAL && bad == &wr[1]);
	struct ibv_recv_wr rwr = { .sg_list = sge, .num_sge = 5 }, *rbad = NULL;
	CHECK(ibv_post_recv(p->qp[1], &rwr, &rbad) == EINVAL && rbad == &rwr);
	struct ibv_wc wc;
	CHECK(ibv_poll_cq(p->cq, 0, &wc) == 0);
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	event(&p);
	refusals(&p);
	CHECK(ibv_destroy_qp(p.qp[0]) == 0 && ibv_destroy_qp(p.qp[1]) == 0);
	/* One event is not acknowledged: the destroy in the other thread must wait for it. */
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, destroy, p.rcq) == 0);
	for (int i = 0; i < 1000; i++)
		sched_yield();
	atomic_store(&acknowledged, 1);
	ibv_ack_cq_events(p.rcq, 1);
	CHECK(pthread_join(thread, NULL) == 0);
	CHECK(ibv_destroy_comp_channel(p.channel) == 0 && ibv_destroy_cq(p.cq) == 0);
	CHECK(ibv_dereg_mr(p.mr) == 0 && ibv_dealloc_pd(p.pd) == 0 && ibv_close_device(p.context) == 0);
	free(p.buffer);
	return 0;
}
