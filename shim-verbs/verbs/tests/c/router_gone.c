/* The router goes away: the program hears of it, and connections that exist go on, also for programs that sleep. */
#include "pair.h"
#include <poll.h>

static void send_one(struct pair *p, uint64_t wr_id)
{
	struct ibv_sge sge = { (uintptr_t)p->buffer, 64, p->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;
	CHECK(ibv_post_send(p->qp[0], &wr, &bad) == 0);
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	struct ibv_async_event event;

	post_receive(&p, 1, 0, 64);
	send_one(&p, 1);
	expect(p.cq, 1, IBV_WC_SEND);
	expect(p.rcq, 1, IBV_WC_RECV);
	puts("ready");
	fflush(stdout);
	CHECK(ibv_get_async_event(p.context, &event) == 0);
	CHECK(event.event_type == IBV_EVENT_DEVICE_FATAL);
	ibv_ack_async_event(&event);

	CHECK(ibv_req_notify_cq(p.rcq, 0) == 0);
	send_one(&p, 2); /* waits for a receive, and its sender never polls */
	poll(NULL, 0, 20);
	post_receive(&p, 2, 0, 64);
	struct pollfd wake = { .fd = p.channel->fd, .events = POLLIN };
	CHECK(poll(&wake, 1, 10000) == 1);
	expect(p.rcq, 2, IBV_WC_RECV);
	expect(p.cq, 2, IBV_WC_SEND);
	return 0;
}
