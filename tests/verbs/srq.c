/* Shared receive queues: one stock of receives for many queue pairs, each of which keeps its order. */
#include "common.h"

#include <poll.h>

enum { QPS = 4, WRS = 64, LEN = 64 * 1024 };

static struct ibv_pd *pd;
static struct ibv_mr *mr;
static uint8_t *buf;

static struct ibv_srq *make(struct ibv_pd *of, uint32_t wrs, uint32_t limit)
{
	struct ibv_srq_init_attr init = { .attr = { .max_wr = wrs, .max_sge = 2, .srq_limit = limit } };

	errno = 0;
	struct ibv_srq *srq = ibv_create_srq(of, &init);
	if (!srq && errno == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from ibv_create_srq");
	CHECK(init.attr.max_wr >= wrs && init.attr.max_sge >= 2, "what was asked for");
	return MADE(srq);
}

static int post_srq(struct ibv_srq *srq, uint64_t wr_id, size_t off, size_t len)
{
	struct ibv_sge s = { .addr = (uintptr_t)buf + off, .length = (uint32_t)len, .lkey = mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = wr_id, .sg_list = &s, .num_sge = 1 }, *bad = NULL;
	int rc = ibv_post_srq_recv(srq, &wr, &bad);

	if (rc)
		CHECK(bad == &wr, "bad_wr names the refused request");
	return rc;
}

/* B's side of a case: PD, memory and a queue. */
static struct ibv_srq *stock(uint32_t wrs)
{
	pd = MADE(ibv_alloc_pd(ctx));
	buf = calloc(1, LEN);
	mr = MADE(ibv_reg_mr(pd, buf, LEN, IBV_ACCESS_LOCAL_WRITE));
	return make(pd, wrs, 0);
}

static void give_back(struct ibv_srq *srq)
{
	OK(ibv_destroy_srq(srq));
	OK(ibv_dereg_mr(mr));
	OK(ibv_dealloc_pd(pd));
	free(buf);
}

/* QPS pairs, whose B ends share `srq`. */
static void open_pairs(struct pair *p, struct end_cfg c, struct ibv_srq *srq)
{
	struct end_cfg b = c;

	b.srq = srq;
	b.pd = srq ? pd : NULL;
	for (int i = 0; i < QPS; i++)
		p[i] = pair_open(&c, &b);
}

static void close_pairs(struct pair *p)
{
	for (int i = 0; i < QPS; i++) {
		if (p[i].a)
			end_destroy(p[i].a);
		if (p[i].b)
			end_destroy(p[i].b);
	}
}

/* Each QP's messages come in its order, whichever receive each takes, inline or not. */
static void order_by(enum ibv_qp_type type, size_t len)
{
	struct ibv_srq *srq = is_b ? stock(WRS) : NULL;
	struct pair p[QPS];
	size_t head = type == IBV_QPT_UD ? 40 : 0;

	open_pairs(p, (struct end_cfg){ .type = type, .send_wr = 16 }, srq);
	for (int round = 0; round < 10; round++) {
		if (is_b)
			for (int i = 0; i < 4 * QPS; i++)
				OK(post_srq(srq, (uint64_t)i, (size_t)i * 1024, 1024));
		sync_ends();
		for (int m = 0; m < 4 && is_a; m++)
			for (int i = 0; i < QPS; i++) {
				int q = (i + m) % QPS;

				fill(p[q].a->buf, len, (uint64_t)(round * 100 + m * 10 + q));
				OK(post_op(p[q].a, IBV_WR_SEND, 7, 0, len, 0, 0));
				WANT(p[q].a->scq, 7, IBV_WC_SUCCESS);
			}
		for (int q = 0; q < QPS && is_b; q++)
			for (int m = 0; m < 4; m++) {
				struct ibv_wc wc = WAIT(p[q].b->rcq);

				EQ(wc.status, IBV_WC_SUCCESS);
				EQ(wc.byte_len, head + len);
				EQ(wc.qp_num, p[q].b->qp->qp_num);
				SAME(buf + wc.wr_id * 1024 + head, len, (uint64_t)(round * 100 + m * 10 + q));
			}
		sync_ends();
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

static void order_small(void) { order_by(IBV_QPT_RC, 16); }
static void order_large(void) { order_by(IBV_QPT_RC, 900); }
static void order_uc(void) { order_by(IBV_QPT_UC, 900); }
static void order_ud(void) { order_by(IBV_QPT_UD, 900); }

/* One QP's completions are left alone while another uses the queue up many times over. */
static void a_queue_pair_that_is_not_polled_holds_nobody_up(void)
{
	struct ibv_srq *srq = is_b ? stock(8) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	if (is_b)
		for (int i = 0; i < 8; i++)
			OK(post_srq(srq, (uint64_t)i, (size_t)i * 1024, 1024));
	sync_ends();
	for (int i = 0; i < 3 && is_a; i++) {
		fill(p[0].a->buf, 500, (uint64_t)i);
		OK(post_op(p[0].a, IBV_WR_SEND, 1, 0, 500, 0, 0));
		WANT(p[0].a->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	for (int i = 0; i < 100; i++) {
		if (is_a) {
			OK(post_op(p[1].a, IBV_WR_SEND, 2, 0, 64, 0, 0));
			WANT(p[1].a->scq, 2, IBV_WC_SUCCESS);
		}
		if (is_b) {
			struct ibv_wc wc = WAIT(p[1].b->rcq);

			EQ(wc.status, IBV_WC_SUCCESS);
			OK(post_srq(srq, wc.wr_id, wc.wr_id * 1024, 1024));
		}
	}
	sync_ends();
	for (int i = 0; i < 3 && is_b; i++) {
		struct ibv_wc wc = WAIT(p[0].b->rcq);

		EQ(wc.byte_len, 500);
		SAME(buf + wc.wr_id * 1024, 500, (uint64_t)i);
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

/* More messages than any ring holds, before the receiver polls once: they wait, and none is lost or fails. */
static void a_receiver_that_is_late_gets_all(void)
{
	enum { MANY = 400 };
	struct ibv_srq *srq = is_b ? stock(MANY) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ .send_wr = MANY, .rnr_retry = NONE, .cqe = MANY }, srq);
	if (is_b)
		for (int i = 0; i < MANY; i++)
			OK(post_srq(srq, (uint64_t)i, (size_t)i * 64, 64));
	sync_ends();
	for (int i = 0; i < MANY && is_a; i++)
		OK(post_op(p[0].a, IBV_WR_SEND, (uint64_t)i, 0, 48, 0, 0));
	sync_ends();
	for (int i = 0; i < MANY; i++) {
		if (is_b)
			WANT(p[0].b->rcq, (uint64_t)i, IBV_WC_SUCCESS);
		if (is_a)
			WANT(p[0].a->scq, (uint64_t)i, IBV_WC_SUCCESS);
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

/* A send that finds no receive waits for one, whichever QP's it is. */
static void a_send_waits_for_a_receive(void)
{
	struct ibv_srq *srq = is_b ? stock(8) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	for (int i = 0; i < QPS && is_a; i++)
		OK(post_op(p[i].a, IBV_WR_SEND, (uint64_t)i, 0, 32, 0, 0));
	sync_ends();
	be_late();
	for (int i = 0; i < QPS && is_b; i++)
		OK(post_srq(srq, (uint64_t)i, 0, 64));
	for (int i = 0; i < QPS; i++) {
		if (is_a)
			WANT(p[i].a->scq, (uint64_t)i, IBV_WC_SUCCESS);
		if (is_b)
			EQ(WAIT(p[i].b->rcq).status, IBV_WC_SUCCESS);
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

static struct ibv_async_event next_event(void)
{
	struct pollfd f = { .fd = ctx->async_fd, .events = POLLIN };
	struct ibv_async_event e;

	EQ(poll(&f, 1, 10000), 1);
	EQ(ibv_get_async_event(ctx, &e), 0);
	return e;
}

static void no_event(void)
{
	struct pollfd f = { .fd = ctx->async_fd, .events = POLLIN };

	EQ(poll(&f, 1, 0), 0);
}

/* IBV_EVENT_SRQ_LIMIT_REACHED comes once for each arming, when fewer receives wait than the limit says. */
static void limit(void)
{
	struct ibv_srq *srq = is_b ? stock(8) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	if (is_b) {
		struct ibv_srq_attr a = { .srq_limit = 3 };

		for (int i = 0; i < 5; i++)
			OK(post_srq(srq, (uint64_t)i, 0, 64));
		OK(ibv_modify_srq(srq, &a, IBV_SRQ_LIMIT));
		OK(ibv_query_srq(srq, &a));
		EQ(a.srq_limit, 3);
	}
	for (int i = 0; i < 4; i++) {
		sync_ends();
		if (is_b && i == 2)
			no_event(); /* three are left */
		sync_ends();
		if (is_a) {
			OK(post_op(p[i % QPS].a, IBV_WR_SEND, 1, 0, 8, 0, 0));
			WANT(p[i % QPS].a->scq, 1, IBV_WC_SUCCESS);
		}
		if (is_b)
			WAIT(p[i % QPS].b->rcq);
	}
	if (is_b) {
		struct ibv_srq_attr a;
		struct ibv_async_event e = next_event();

		EQ(e.event_type, IBV_EVENT_SRQ_LIMIT_REACHED);
		CHECK(e.element.srq == srq, "the queue it is about");
		ibv_ack_async_event(&e);
		OK(ibv_query_srq(srq, &a));
		EQ(a.srq_limit, 0);
		no_event();
		/* Below already: told at once. */
		a.srq_limit = 8;
		OK(ibv_modify_srq(srq, &a, IBV_SRQ_LIMIT));
		e = next_event();
		EQ(e.event_type, IBV_EVENT_SRQ_LIMIT_REACHED);
		ibv_ack_async_event(&e);
		a.srq_limit = 9;
		RC(ibv_modify_srq(srq, &a, IBV_SRQ_LIMIT), EINVAL);
		RC(ibv_modify_srq(srq, &a, IBV_SRQ_LIMIT | 64), EINVAL);
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

/* A QP in ERR takes no receive with it: the last-WQE event comes, and the others go on with all of them. */
static void a_failed_queue_pair_leaves_the_receives(void)
{
	struct ibv_srq *srq = is_b ? stock(4) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	if (is_b) {
		for (int i = 0; i < 4; i++)
			OK(post_srq(srq, (uint64_t)i, 0, 64));
		OK(qp_set_state(p[0].b->qp, IBV_QPS_ERR));
		struct ibv_async_event e = next_event();

		EQ(e.event_type, IBV_EVENT_QP_LAST_WQE_REACHED);
		CHECK(e.element.qp == p[0].b->qp, "the QP it is about");
		ibv_ack_async_event(&e);
		EMPTY(p[0].b->rcq);
	}
	sync_ends();
	for (int i = 0; i < 4; i++) {
		if (is_a) {
			OK(post_op(p[1].a, IBV_WR_SEND, 1, 0, 8, 0, 0));
			WANT(p[1].a->scq, 1, IBV_WC_SUCCESS);
		}
		if (is_b)
			WANT(p[1].b->rcq, (uint64_t)i, IBV_WC_SUCCESS);
	}
	sync_ends();
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

/* Destroying a QP frees what its unpolled completions held, and only that. */
static void a_destroyed_queue_pair_gives_its_receives_back(void)
{
	struct ibv_srq *srq = is_b ? stock(4) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	for (int i = 0; i < 4 && is_b; i++)
		OK(post_srq(srq, (uint64_t)i, 0, 64));
	sync_ends();
	for (int i = 0; i < 3 && is_a; i++) {
		OK(post_op(p[0].a, IBV_WR_SEND, 1, 0, 8, 0, 0));
		WANT(p[0].a->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (is_b) {
		end_destroy_qp(p[0].b);
		for (uint64_t i = 4; i < 7; i++)
			OK(post_srq(srq, i, 0, 64));
		RC(post_srq(srq, 7, 0, 64), ENOMEM);
	}
	sync_ends();
	for (int i = 3; i < 7; i++) {
		if (is_a) {
			OK(post_op(p[1].a, IBV_WR_SEND, 1, 0, 8, 0, 0));
			WANT(p[1].a->scq, 1, IBV_WC_SUCCESS);
		}
		if (is_b)
			WANT(p[1].b->rcq, (uint64_t)i, IBV_WC_SUCCESS);
	}
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

/* A receive too short for its message fails there and here, and costs the other QPs nothing. */
static void too_long_for_the_receive(void)
{
	struct ibv_srq *srq = is_b ? stock(4) : NULL;
	struct pair p[QPS];

	open_pairs(p, (struct end_cfg){ 0 }, srq);
	if (is_b) {
		OK(post_srq(srq, 1, 0, 16));
		OK(post_srq(srq, 2, 0, 64));
	}
	sync_ends();
	if (is_a) {
		OK(post_op(p[0].a, IBV_WR_SEND, 1, 0, 17, 0, 0));
		WANT(p[0].a->scq, 1, IBV_WC_REM_INV_REQ_ERR);
	}
	if (is_b) {
		struct ibv_async_event e;

		WANT(p[0].b->rcq, 1, IBV_WC_LOC_LEN_ERR);
		e = next_event();
		EQ(e.event_type, IBV_EVENT_QP_LAST_WQE_REACHED);
		ibv_ack_async_event(&e);
	}
	sync_ends();
	if (is_a) {
		OK(post_op(p[1].a, IBV_WR_SEND, 1, 0, 17, 0, 0));
		WANT(p[1].a->scq, 1, IBV_WC_SUCCESS);
	}
	if (is_b)
		WANT(p[1].b->rcq, 2, IBV_WC_SUCCESS);
	sync_ends();
	close_pairs(p);
	if (is_b)
		give_back(srq);
}

static void limits_and_errors(void)
{
	struct ibv_srq *srq = stock(4);
	struct ibv_srq_attr a;
	struct ibv_sge s[3] = { 0 };
	struct ibv_recv_wr wr = { .sg_list = s, .num_sge = 3 }, *bad = NULL;

	OK(ibv_query_srq(srq, &a));
	CHECK(a.max_wr >= 4 && a.max_sge >= 2 && a.srq_limit == 0, "the attributes it was made with");
	if (a.max_sge < 3)
		CHECK(ibv_post_srq_recv(srq, &wr, &bad) != 0 && bad == &wr, "more entries than max_sge");
	for (uint32_t i = 0; i < a.max_wr; i++)
		OK(post_srq(srq, i, 0, 8));
	RC(post_srq(srq, 9, 0, 8), ENOMEM);

	struct ibv_srq_init_attr init = { .attr = { .max_wr = (uint32_t)dev_attr.max_srq_wr + 1, .max_sge = 1 } };
	NOT_MADE(ibv_create_srq(pd, &init), EINVAL);
	init.attr = (struct ibv_srq_attr){ .max_wr = 1, .max_sge = (uint32_t)dev_attr.max_srq_sge + 1 };
	NOT_MADE(ibv_create_srq(pd, &init), EINVAL);

	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 8, NULL, NULL, 0));
	struct ibv_qp_init_attr qi = qp_init_attr(NULL, cq, cq);
	qi.srq = srq;
	struct ibv_qp *qp = MADE(ibv_create_qp(pd, &qi));
	EQ(qi.cap.max_recv_wr, 0);
	RC(ibv_destroy_srq(srq), EBUSY);
	wr = (struct ibv_recv_wr){ 0 };
	RC(ibv_post_recv(qp, &wr, &bad), EINVAL);
	OK(ibv_destroy_qp(qp));
	OK(ibv_destroy_cq(cq));
	RC(ibv_dealloc_pd(pd), EBUSY);
	give_back(srq);
}

static const struct test_case cases[] = {
	{ "order_small", order_small, 0 },
	{ "order_large", order_large, 0 },
	{ "order_uc", order_uc, 0 },
	{ "order_ud", order_ud, 0 },
	{ "a_queue_pair_that_is_not_polled_holds_nobody_up", a_queue_pair_that_is_not_polled_holds_nobody_up, 0 },
	{ "a_receiver_that_is_late_gets_all", a_receiver_that_is_late_gets_all, 0 },
	{ "a_send_waits_for_a_receive", a_send_waits_for_a_receive, 0 },
	{ "limit", limit, 0 },
	{ "a_failed_queue_pair_leaves_the_receives", a_failed_queue_pair_leaves_the_receives, 0 },
	{ "a_destroyed_queue_pair_gives_its_receives_back", a_destroyed_queue_pair_gives_its_receives_back, 0 },
	{ "too_long_for_the_receive", too_long_for_the_receive, 0 },
	{ "limits_and_errors", limits_and_errors, LOCAL },
};
SUITE(cases)
