/* The router is killed: connections that exist go on, also for programs that sleep. Another one takes its place: it knows
 * what there was, and makes new things. */
#include "pair.h"
#include <poll.h>

static void send_one(struct pair *p, uint64_t wr_id)
{
	struct ibv_sge sge = { (uintptr_t)p->buffer, 64, p->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;
	CHECK(ibv_post_send(p->qp[0], &wr, &bad) == 0);
}

static void say(const char *word)
{
	puts(word);
	fflush(stdout);
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	post_receive(&p, 1, 0, 64);
	send_one(&p, 1);
	expect(p.cq, 1, IBV_WC_SEND);
	expect(p.rcq, 1, IBV_WC_RECV);
	say("ready");
	CHECK(getchar() == 'x'); /* it is dead */

	CHECK(ibv_req_notify_cq(p.rcq, 0) == 0);
	send_one(&p, 2); /* waits for a receive, and its sender never polls */
	poll(NULL, 0, 20);
	post_receive(&p, 2, 0, 64);
	struct pollfd wake = { .fd = p.channel->fd, .events = POLLIN };
	CHECK(poll(&wake, 1, 10000) == 1);
	expect(p.rcq, 2, IBV_WC_RECV);
	expect(p.cq, 2, IBV_WC_SEND);

	say("alone"); /* another one is started now: this waits for it */
	uint32_t old = p.qp[0]->qp_num;
	struct ibv_mr *mr = ibv_reg_mr(p.pd, p.buffer, SIZE, IBV_ACCESS_LOCAL_WRITE);
	CHECK(mr && mr->lkey != p.mr->lkey);
	struct pair q = make_pair(0, p.context, NULL);
	CHECK(q.qp[0]->qp_num != old && q.qp[1]->qp_num != old);
	post_receive(&q, 3, 0, 64);
	send_one(&q, 3);
	expect(q.cq, 3, IBV_WC_SEND);
	expect(q.rcq, 3, IBV_WC_RECV);
	post_receive(&p, 4, 0, 64);
	send_one(&p, 4);
	expect(p.cq, 4, IBV_WC_SEND);
	expect(p.rcq, 4, IBV_WC_RECV);
	free_pair(&q);
	CHECK(ibv_dereg_mr(mr) == 0);
	free_pair(&p); /* the new router had all of it */
	return 0;
}
