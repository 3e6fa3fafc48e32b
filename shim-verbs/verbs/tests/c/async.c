/* Async events: a peer that breaks the rules costs both QPs their state; the event names the QP, and its destroy waits
 * for the acknowledgement. */
#include "pair.h"
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

static atomic_int acknowledged;

static void *destroy(void *qp)
{
	CHECK(ibv_destroy_qp(qp) == 0);
	CHECK(atomic_load(&acknowledged) == 1);
	return NULL;
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	struct ibv_sge sge = { (uintptr_t)p.buffer, 8, p.mr->lkey };
	struct ibv_send_wr wr = { .wr_id = 1, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE,
				  .wr.rdma = { (uintptr_t)p.buffer + SIZE, p.mr->rkey ^ 0x10000 } }, *bad;
	CHECK(ibv_post_send(p.qp[0], &wr, &bad) == 0);
	struct ibv_wc wc = one(p.cq); /* not signalled, but it failed */
	CHECK(wc.status == IBV_WC_REM_ACCESS_ERR && wc.wr_id == 1 && wc.qp_num == p.qp[0]->qp_num);

	struct ibv_async_event event;
	CHECK(ibv_get_async_event(p.context, &event) == 0);
	CHECK(event.event_type == IBV_EVENT_QP_ACCESS_ERR && event.element.qp == p.qp[1]);
	struct pollfd fd = { .fd = p.context->async_fd, .events = POLLIN };
	CHECK(poll(&fd, 1, 0) == 0); /* there is no other */

	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;
	for (int i = 0; i < 2; i++) {
		CHECK(ibv_query_qp(p.qp[i], &attr, IBV_QP_STATE, &init) == 0);
		CHECK(attr.qp_state == IBV_QPS_ERR && p.qp[i]->state == IBV_QPS_ERR);
	}
	pthread_t thread;
	CHECK(pthread_create(&thread, NULL, destroy, p.qp[1]) == 0);
	for (int i = 0; i < 1000; i++)
		sched_yield();
	atomic_store(&acknowledged, 1);
	ibv_ack_async_event(&event);
	CHECK(pthread_join(thread, NULL) == 0);

	CHECK(ibv_destroy_qp(p.qp[0]) == 0 && ibv_destroy_cq(p.cq) == 0 && ibv_destroy_cq(p.rcq) == 0);
	CHECK(ibv_destroy_comp_channel(p.channel) == 0 && ibv_dereg_mr(p.mr) == 0 && ibv_dealloc_pd(p.pd) == 0);
	CHECK(ibv_close_device(p.context) == 0);
	free(p.buffer);
	return 0;
}
