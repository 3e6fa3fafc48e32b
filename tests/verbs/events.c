/* Completion channels and async events: who is woken, when, how often, and that no wake-up is lost. */
#include "common.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/epoll.h>

static const struct end_cfg ON_CHANNEL = { .with_channel = 1 };

static bool has_event(const struct ibv_comp_channel *channel)
{
	struct pollfd p = { .fd = channel->fd, .events = POLLIN };

	return poll(&p, 1, 0) == 1;
}

/* A sends one message that B has a receive for; both complete.  Polls A's CQ but not B's. */
static void one_message(struct pair *p, int flags)
{
	if (p->b)
		OK(post_receive(p->b, 5, 0, 64));
	sync_ends();
	if (p->a) {
		OK(post_op(p->a, IBV_WR_SEND, 6, 0, 8, 0, flags));
		WANT(p->a->scq, 6, IBV_WC_SUCCESS);
	}
	sync_ends();
}

/* The receiver's completion may come after the sender's (its event with it): wait for it by polling, then look. */
static void received(struct pair *p)
{
	if (p->b)
		WANT(p->b->rcq, 5, IBV_WC_SUCCESS);
}

/* ---- arming ------------------------------------------------------------------------------------------------------ */

static void not_armed_no_event(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	one_message(&p, 0);
	received(&p);
	if (p.b)
		CHECK(!has_event(p.b->channel), "an event on a CQ that was never armed");
	if (p.a)
		CHECK(!has_event(p.a->channel), "an event on a CQ that was never armed");
}

/* Armed once, one event, however many completions follow. */
static void armed_once_one_event(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b)
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	for (int i = 0; i < 3; i++)
		one_message(&p, 0);
	if (p.b) {
		CHECK(EVENT(p.b->channel) == p.b->rcq, "another CQ's event");
		for (int i = 0; i < 3; i++)
			WANT(p.b->rcq, 5, IBV_WC_SUCCESS);
		CHECK(!has_event(p.b->channel), "a second event for one arming");
	}
	/* armed again, it wakes again */
	if (p.b)
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	one_message(&p, 0);
	if (p.b)
		CHECK(EVENT(p.b->channel) == p.b->rcq, "another CQ's event");
	received(&p);
}

/*
 * Arming asks for the *next* completion: what was there already makes no event (man ibv_req_notify_cq), which is why
 * programs poll after arming.  Providers may wake anyway; they may not fail to wake for the next one.
 */
static void arming_is_for_the_next(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	one_message(&p, 0);
	if (p.b)
		WANT(p.b->rcq, 5, IBV_WC_SUCCESS);
	if (p.b) {
		OK(ibv_req_notify_cq(p.b->rcq, 0));
		CHECK(!has_event(p.b->channel), "an event for a completion that was polled before the arming");
	}
	one_message(&p, 0);
	if (p.b)
		EVENT(p.b->channel);
	received(&p);
}

static void solicited_only(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b)
		OK(ibv_req_notify_cq(p.b->rcq, 1));
	one_message(&p, 0);
	received(&p);
	if (p.b)
		CHECK(!has_event(p.b->channel), "an event for a message that was not solicited");
	one_message(&p, IBV_SEND_SOLICITED);
	if (p.b)
		EVENT(p.b->channel);
	received(&p);
	/* an arming for any completion is not narrowed by one for solicited ones */
	if (p.b) {
		OK(ibv_req_notify_cq(p.b->rcq, 0));
		OK(ibv_req_notify_cq(p.b->rcq, 1));
	}
	one_message(&p, 0);
	if (p.b)
		EVENT(p.b->channel);
	received(&p);
}

/* ---- moderation -------------------------------------------------------------------------------------------------- */

static void moderate(struct ibv_cq *cq, uint16_t count, uint16_t period)
{
	struct ibv_modify_cq_attr m = { .attr_mask = IBV_CQ_ATTR_MODERATE, .moderate = { count, period } };
	int error = ibv_modify_cq(cq, &m);

	if (error == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from ibv_modify_cq");
	OK(error);
}

/* Events for every fourth completion, also when the CQ is armed between them only. */
static void moderated_by_count(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b)
		moderate(p.b->rcq, 4, 0);
	for (int round = 0; round < 3; round++) {
		if (p.b)
			OK(ibv_req_notify_cq(p.b->rcq, 0));
		for (int i = 0; i < 4; i++) {
			if (p.b)
				CHECK(!has_event(p.b->channel), "an event after %d of 4 completions", i);
			one_message(&p, 0);
			received(&p);
		}
		if (p.b) {
			CHECK(EVENT(p.b->channel) == p.b->rcq, "another CQ's event");
			CHECK(!has_event(p.b->channel), "a second event for one arming");
		}
	}
	/* the other CQ of the channel is not moderated */
	if (p.b) {
		OK(ibv_req_notify_cq(p.b->scq, 0));
		OK(post_op(p.b, IBV_WR_RDMA_WRITE, 7, 0, 8, 0, 0));
		CHECK(EVENT(p.b->channel) == p.b->scq, "another CQ's event");
		WANT(p.b->scq, 7, IBV_WC_SUCCESS);
	}
}

/* Too few completions: their event comes when the period is over. What is solicited counts, if that is what was asked for. */
static void moderated_by_period(void)
{
	enum { PERIOD_US = 30000 };
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);
	double start = 0;

	if (p.b)
		moderate(p.b->rcq, 1000, PERIOD_US);
	for (int round = 0; round < 2; round++) {
		if (p.b) {
			start = now();
			OK(ibv_req_notify_cq(p.b->rcq, round));
		}
		one_message(&p, round ? IBV_SEND_SOLICITED : 0);
		received(&p);
		if (p.b) {
			CHECK(EVENT(p.b->channel) == p.b->rcq, "another CQ's event");
			CHECK(now() - start >= PERIOD_US * 1e-6, "the event came too early");
		}
	}
}

/* What is held back makes its event when that is changed, and then each completion makes one. */
static void moderation_ends(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b) {
		struct ibv_modify_cq_attr bad = { .attr_mask = 2 };

		moderate(p.b->rcq, 1000, 0);
		RC(ibv_modify_cq(p.b->rcq, &bad), EINVAL);
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	}
	one_message(&p, 0);
	received(&p);
	if (p.b) {
		CHECK(!has_event(p.b->channel), "an event after 1 of 1000 completions");
		moderate(p.b->rcq, 0, 0);
		EVENT(p.b->channel);
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	}
	one_message(&p, 0);
	if (p.b)
		EVENT(p.b->channel);
	received(&p);
}

/* WRITE_WITH_IMM may be solicited too; SOLICITED on a plain WRITE means nothing. */
static void solicited_write_imm(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b) {
		OK(post_receive(p.b, 5, 0, 0));
		OK(ibv_req_notify_cq(p.b->rcq, 1));
	}
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 0, IBV_SEND_SOLICITED));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE_WITH_IMM, 2, 0, 8, 0, IBV_SEND_SOLICITED));
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	if (p.b)
		EVENT(p.b->channel);
	received(&p);
}

/* A completion in error wakes those who asked for solicited ones only. */
static void errors_are_solicited(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b) {
		OK(post_receive(p.b, 5, 0, 64));
		OK(ibv_req_notify_cq(p.b->rcq, 1));
		OK(qp_set_state(p.b->qp, IBV_QPS_ERR));
		EVENT(p.b->channel);
		WANT(p.b->rcq, 5, IBV_WC_WR_FLUSH_ERR);
	}
	sync_ends();
}

/* ---- the descriptor ---------------------------------------------------------------------------------------------- */

static void nonblocking(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);
	struct ibv_cq *cq = NULL;
	void *context = NULL;

	if (p.b) {
		int flags = fcntl(p.b->channel->fd, F_GETFL);

		CHECK(flags >= 0, "the channel's descriptor is not open");
		EQ(fcntl(p.b->channel->fd, F_SETFL, flags | O_NONBLOCK), 0);
		errno = 0;
		EQ(ibv_get_cq_event(p.b->channel, &cq, &context), -1);
		EQ(errno, EAGAIN);
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	}
	one_message(&p, 0);
	received(&p);
	if (p.b) {
		struct pollfd f = { .fd = p.b->channel->fd, .events = POLLIN };

		EQ(poll(&f, 1, 10000), 1);
		EQ(ibv_get_cq_event(p.b->channel, &cq, &context), 0);
		CHECK(cq == p.b->rcq && context == p.b, "another CQ's event");
		ibv_ack_cq_events(cq, 1);
		errno = 0;
		EQ(ibv_get_cq_event(p.b->channel, &cq, &context), -1);
		EQ(errno, EAGAIN);
	}
}

static void epoll_level(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);
	struct epoll_event event = { .events = EPOLLIN, .data.u64 = 42 }, got;
	int ep = epoll_create1(EPOLL_CLOEXEC);

	if (p.b) {
		EQ(epoll_ctl(ep, EPOLL_CTL_ADD, p.b->channel->fd, &event), 0);
		EQ(epoll_wait(ep, &got, 1, 0), 0);
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	}
	one_message(&p, 0);
	if (p.b) {
		EQ(epoll_wait(ep, &got, 1, 10000), 1);
		EQ(got.data.u64, 42);
		EQ(epoll_wait(ep, &got, 1, 0), 1); /* until the event is taken */
		EVENT(p.b->channel);
		EQ(epoll_wait(ep, &got, 1, 0), 0);
	}
	received(&p);
	close(ep);
}

static void two_cqs_one_channel(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);
	struct ibv_cq *first, *second;

	if (p.a) {
		OK(post_receive(p.a, 5, 0, 64));
		OK(ibv_req_notify_cq(p.a->scq, 0));
		OK(ibv_req_notify_cq(p.a->rcq, 0));
	}
	sync_ends();
	if (p.b) {
		OK(post_receive(p.b, 5, 0, 64));
		OK(post_op(p.b, IBV_WR_SEND, 1, 0, 8, 0, 0));
	}
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_SEND, 2, 0, 8, 0, 0));
		first = EVENT(p.a->channel);
		second = EVENT(p.a->channel);
		CHECK(first != second, "two events of one CQ");
		CHECK(first == p.a->scq || first == p.a->rcq, "an unknown CQ");
		CHECK(!has_event(p.a->channel), "a third event");
		WANT(p.a->rcq, 5, IBV_WC_SUCCESS);
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	if (p.b)
		WANT(p.b->scq, 1, IBV_WC_SUCCESS);
}

/* ---- acknowledging ----------------------------------------------------------------------------------------------- */

struct destroyer {
	struct ibv_cq *cq;
	int done; /* written by the thread */
};

static void *destroy_cq(void *arg)
{
	struct destroyer *d = arg;

	OK(ibv_destroy_cq(d->cq));
	__atomic_store_n(&d->done, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

/* ibv_destroy_cq waits until every event that was taken is acknowledged. */
static void destroy_waits_for_ack(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);
	struct ibv_cq *cq = NULL;
	void *context = NULL;
	pthread_t thread;

	if (p.b)
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	one_message(&p, 0);
	received(&p);
	if (p.b) {
		struct destroyer d = { p.b->rcq, 0 };

		EQ(ibv_get_cq_event(p.b->channel, &cq, &context), 0);
		end_destroy_qp(p.b);
		p.b->rcq = NULL; /* the thread's now */
		EQ(pthread_create(&thread, NULL, destroy_cq, &d), 0);
		be_late();
		CHECK(!__atomic_load_n(&d.done, __ATOMIC_SEQ_CST), "the CQ went with an event unacknowledged");
		ibv_ack_cq_events(cq, 1);
		EQ(pthread_join(thread, NULL), 0);
		EQ(d.done, 1);
	}
	sync_ends();
}

/* An event nobody took does not hold the CQ, and does not come out of the channel after it. */
static void untaken_event_goes_with_its_cq(void)
{
	struct pair p = pair_open(&ON_CHANNEL, &ON_CHANNEL);

	if (p.b)
		OK(ibv_req_notify_cq(p.b->rcq, 0));
	one_message(&p, 0);
	received(&p);
	if (p.b) {
		end_destroy_qp(p.b);
		OK(ibv_destroy_cq(p.b->rcq));
		p.b->rcq = NULL;
		CHECK(!has_event(p.b->channel), "an event of a CQ that is gone");
	}
	sync_ends();
}

/* ---- no lost wake-up --------------------------------------------------------------------------------------------- */

/* Two sides that sleep for every message.  In --self they are two threads; a lost wake-up ends in EVENT's time limit. */
enum { WINDOW = 16 };

static uint64_t turns(void)
{
	return is_rxe ? 2000 : 20000; /* its home here is an emulated machine */
}

struct player {
	struct end *e;
	bool starts;
};

static void *play(void *arg)
{
	struct player *me = arg;
	struct end *e = me->e;
	uint64_t sent = 0, got = 0;

	if (me->starts)
		OK(post_op(e, IBV_WR_SEND, sent++, 0, 16, 0, IBV_SEND_SOLICITED));
	while (got < turns()) {
		struct ibv_wc wc = SLEEP_FOR_WC(e->channel, e->scq);

		EQ(wc.status, IBV_WC_SUCCESS);
		if (wc.opcode != IBV_WC_RECV)
			continue;
		EQ(wc.wr_id, got++);
		OK(post_receive(e, got + WINDOW - 1, 64, 64));
		if (sent < turns())
			OK(post_op(e, IBV_WR_SEND, sent++, 0, 16, 0, IBV_SEND_SOLICITED));
	}
	return NULL;
}

static void no_lost_wake_up(void)
{
	struct end_cfg c = { .with_channel = 1, .one_cq = 1, .cqe = 512, .recv_wr = 2 * WINDOW };
	struct pair p = pair_open(&c, &c);
	struct player a = { p.a, true }, b = { p.b, false };
	struct end *ends[2] = { p.a, p.b };
	pthread_t other;

	for (int i = 0; i < 2; i++)
		for (uint64_t k = 0; ends[i] && k < WINDOW; k++)
			OK(post_receive(ends[i], k, 64, 64));
	sync_ends();
	if (p.a && p.b)
		EQ(pthread_create(&other, NULL, play, &b), 0);
	play(p.a ? &a : &b);
	if (p.a && p.b)
		EQ(pthread_join(other, NULL), 0);
	sync_ends();
}

/* ---- async ------------------------------------------------------------------------------------------------------- */

/* The responder hears of a request that its QP refused (IBA 11.6.3.1); the event carries the QP. */
static void qp_access_error_event(void)
{
	struct pair p = pair_open(NULL, NULL);
	struct pollfd f = { .fd = ctx->async_fd, .events = POLLIN };
	struct ibv_async_event event;

	if (is_rxe)
		skip_case("soft-RoCE raises no event for it");
	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 4096, 0));
		WANT(p.a->scq, 1, IBV_WC_REM_ACCESS_ERR);
	}
	sync_ends();
	if (p.b) {
		EQ(poll(&f, 1, 10000), 1);
		EQ(ibv_get_async_event(ctx, &event), 0);
		EQ(event.event_type, IBV_EVENT_QP_ACCESS_ERR);
		CHECK(event.element.qp == p.b->qp, "another QP's event");
		ibv_ack_async_event(&event);
		EQ(poll(&f, 1, 0), 0);
	}
}

/* The first packet on a QP in RTR. */
static void comm_est_event(void)
{
	struct pair p = pair_create(NULL, NULL);
	struct pollfd f = { .fd = ctx->async_fd, .events = POLLIN };
	struct ibv_async_event event;

	if (is_rxe)
		skip_case("soft-RoCE raises no event for it");
	if (p.b) {
		OK(qp_init(p.b));
		OK(post_receive(p.b, 1, 0, 64));
		OK(qp_rtr(p.b));
	}
	sync_ends();
	if (p.a) {
		end_connect(p.a);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 8, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	if (p.b) {
		WANT(p.b->rcq, 1, IBV_WC_SUCCESS);
		EQ(poll(&f, 1, 10000), 1);
		EQ(ibv_get_async_event(ctx, &event), 0);
		EQ(event.event_type, IBV_EVENT_COMM_EST);
		CHECK(event.element.qp == p.b->qp, "another QP's event");
		ibv_ack_async_event(&event);
		OK(qp_rts(p.b));
	}
	sync_ends();
}

/* More completions than a CQ holds: an error event (IBA 11.6.3.1), or every completion all the same; none lost or changed in silence. */
static void cq_overrun(void)
{
	struct end_cfg a = { .cqe = 1, .send_wr = 8192 };
	struct pair p = pair_open(&a, NULL);
	struct pollfd f = { .fd = ctx->async_fd, .events = POLLIN };
	struct ibv_async_event event;
	bool overrun = false;

	if (p.a) {
		int posted = p.a->scq->cqe + 2, got = 0;
		struct ibv_wc wc;
		for (int i = 0; i < posted; i++)
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, (uint64_t)i, 0, 8, 0, 0));
		while (got < posted && !overrun) {
			int n = ibv_poll_cq(p.a->scq, 1, &wc);
			overrun = n < 0 || poll(&f, 1, 0) == 1;
			if (n == 1 && !overrun) {
				EQ(wc.wr_id, (uint64_t)got);
				EQ(wc.status, IBV_WC_SUCCESS);
				got++;
			}
		}
		if (!overrun)
			EQ(ibv_poll_cq(p.a->scq, 1, &wc), 0);
		for (int i = 0; overrun && (i == 0 || poll(&f, 1, 0) == 1); i++) { /* the QP may report its own end */
			EQ(ibv_get_async_event(ctx, &event), 0);
			if (i == 0) {
				EQ(event.event_type, IBV_EVENT_CQ_ERR);
				CHECK(event.element.cq == p.a->scq, "another CQ's event");
			} else {
				CHECK(event.event_type == IBV_EVENT_CQ_ERR || event.event_type == IBV_EVENT_QP_FATAL, "got %d", event.event_type);
			}
			ibv_ack_async_event(&event);
		}
	}
	sync_ends();
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(not_armed_no_event), CASE(armed_once_one_event), CASE(arming_is_for_the_next), CASE(solicited_only), CASE(solicited_write_imm),
	CASE(moderated_by_count), CASE(moderated_by_period), CASE(moderation_ends),
	CASE(errors_are_solicited), CASE(nonblocking), CASE(epoll_level), CASE(two_cqs_one_channel), CASE(destroy_waits_for_ack),
	CASE(untaken_event_goes_with_its_cq), CASE(no_lost_wake_up), CASE(qp_access_error_event), CASE(comm_est_event), CASE(cq_overrun),
};
SUITE(cases)
