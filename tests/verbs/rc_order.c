/* RC: what comes after what, on one QP, between QPs and on a CQ, and what happens when a queue is full. */
#include "common.h"

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* A send tells that the writes before it are there. */
static void writes_before_send(void)
{
	enum { LEN = 32 << 10, TURNS = 32 };
	struct end_cfg c = { .len = LEN + 64 };
	struct pair p = pair_open(&c, &c);

	for (uint64_t turn = 1; turn <= TURNS; turn++) {
		if (p.b)
			OK(post_receive(p.b, turn, LEN, 64));
		sync_ends();
		if (p.a) {
			fill(p.a->buf, LEN, turn);
			for (uint64_t i = 0; i < 8; i++)
				OK(post_op(p.a, IBV_WR_RDMA_WRITE, i, i * LEN / 8, LEN / 8, i * LEN / 8, 0));
			OK(post_op(p.a, IBV_WR_SEND, 8, LEN, 8, 0, 0));
		}
		if (p.b) {
			WANT(p.b->rcq, turn, IBV_WC_SUCCESS);
			SAME(p.b->buf, LEN, turn);
		}
		for (uint64_t i = 0; p.a && i <= 8; i++)
			WANT(p.a->scq, i, IBV_WC_SUCCESS);
	}
}

/* The habit of every latency benchmark: the last byte of a write appears after the others. */
static void last_byte_polling(void)
{
	enum { LEN = 2000, TURNS = 200 };
	struct end_cfg c = { .len = LEN };
	struct pair p = pair_open(&c, &c);

	for (uint64_t turn = 1; turn <= TURNS; turn++) {
		if (p.b)
			memset(p.b->buf, 0, LEN);
		sync_ends();
		if (p.a) {
			fill(p.a->buf, LEN, turn);
			p.a->buf[LEN - 1] = (uint8_t)(1 + turn % 255);
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, turn, 0, LEN, 0, 0));
		}
		if (p.b) {
			volatile uint8_t *last = p.b->buf + LEN - 1;
			double until = now() + 30;

			while (*last != 1 + turn % 255)
				CHECK(now() < until, "the last byte stayed 0x%02x", *last);
			__atomic_thread_fence(__ATOMIC_ACQUIRE);
			SAME(p.b->buf, LEN - 1, turn);
		}
		if (p.a)
			WANT(p.a->scq, turn, IBV_WC_SUCCESS);
		sync_ends();
	}
}

/* A read after a write on one QP sees it; a write after a read does not change what the read brings. */
static void read_after_write(void)
{
	enum { LEN = 8192, TURNS = 32 };
	struct end_cfg c = { .len = 3 * LEN };
	struct pair p = pair_open(&c, &c);

	for (uint64_t turn = 1; p.a && turn <= TURNS; turn++) {
		fill(p.a->buf, LEN, turn);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, LEN, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_READ, 2, LEN, LEN, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
		SAME(p.a->buf + LEN, LEN, turn);
	}
}

/* ---- completions ------------------------------------------------------------------------------------------------- */

/* Mixed operations complete in the order they were posted; receives too. */
static void completion_order(void)
{
	static const enum ibv_wr_opcode MIX[] = { IBV_WR_SEND, IBV_WR_RDMA_READ, IBV_WR_RDMA_WRITE, IBV_WR_ATOMIC_FETCH_AND_ADD,
						  IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_ATOMIC_CMP_AND_SWP, IBV_WR_SEND_WITH_IMM };
	enum { TURNS = 60, RECVS = 3 };
	struct end_cfg c = { .len = 64 << 10 };
	struct pair p = pair_open(&c, &c);
	uint64_t rnd = seed;

	for (uint64_t turn = 0; turn < TURNS; turn++) {
		for (uint64_t i = 0; p.b && i < RECVS; i++)
			OK(post_receive(p.b, turn * RECVS + i, 0, 8192));
		sync_ends();
		for (uint64_t i = 0; p.a && i < COUNT(MIX); i++) {
			size_t len = is_atomic(MIX[i]) ? 8 : 1 + next_random(&rnd) % 8192;

			OK(post_op(p.a, MIX[i], turn * COUNT(MIX) + i, 0, len, 16384, 0));
		}
		for (uint64_t i = 0; p.a && i < COUNT(MIX); i++)
			WANT(p.a->scq, turn * COUNT(MIX) + i, IBV_WC_SUCCESS);
		for (uint64_t i = 0; p.b && i < RECVS; i++)
			WANT(p.b->rcq, turn * RECVS + i, IBV_WC_SUCCESS);
	}
}

static void close_pair(const struct pair *p)
{
	if (p->a)
		end_destroy(p->a);
	if (p->b)
		end_destroy(p->b);
}

/* Pairs that share a CQ, and that. */
static void close_all(const struct pair *p, int count, struct ibv_cq *cq)
{
	for (int q = 0; q < count; q++)
		close_pair(&p[q]);
	OK(ibv_destroy_cq(cq));
}

/* Eight QPs feed one CQ: each one's completions are in its order. */
static void eight_qps_one_cq(void)
{
	enum { QPS = 8, EACH = 40 };
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, QPS * EACH * 2, NULL, NULL, 0));
	struct end_cfg c = { .cq = cq, .len = 4096 };
	struct pair p[QPS];
	uint64_t next[QPS] = { 0 };

	for (int q = 0; q < QPS; q++) {
		p[q] = pair_open(is_a ? &c : NULL, NULL);
		if (p[q].b)
			for (uint64_t i = 0; i < EACH; i++)
				OK(post_receive(p[q].b, i, 64 * (i % 64), 64));
	}
	sync_ends();
	for (uint64_t i = 0; is_a && i < EACH; i++)
		for (int q = 0; q < QPS; q++)
			OK(post_op(p[q].a, i % 3 ? IBV_WR_SEND : IBV_WR_RDMA_WRITE_WITH_IMM, (uint64_t)q << 32 | i, 0, i % 65, 0, 0));
	for (int n = 0; is_a && n < QPS * EACH; n++) {
		struct ibv_wc wc = WAIT(cq);
		uint64_t q = wc.wr_id >> 32;

		EQ(wc.status, IBV_WC_SUCCESS);
		CHECK(q < QPS, "got %" PRIu64, q);
		EQ(wc.wr_id & 0xffffffff, next[q]++);
		EQ(wc.qp_num, p[q].a->qp->qp_num);
	}
	if (is_a)
		EMPTY(cq);
	for (int q = 0; q < QPS; q++)
		for (uint64_t i = 0; p[q].b && i < EACH; i++)
			EQ(WANT(p[q].b->rcq, i, IBV_WC_SUCCESS).byte_len, i % 65);
	sync_ends();
	close_all(p, QPS, cq);
}

/* What a poll finds of a queue pair does not hide what of it came later, however many queue pairs the CQ has. */
static void completions_do_not_hide_others(void)
{
	enum { QPS = 10, TURNS = 3 };
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 256, NULL, NULL, 0));
	struct end_cfg c = { .cq = cq, .len = 4096 };
	struct pair p[QPS];

	for (int q = 0; q < QPS; q++)
		p[q] = pair_open(is_a ? &c : NULL, NULL);
	for (int turn = 0; is_a && turn < TURNS; turn++) {
		struct ibv_wc wc[4];
		int found;

		/* Each has ended when the next call comes: the second is posted when nobody has polled the first. */
		for (uint64_t i = 1; i <= 2; i++) {
			OK(post_op(p[turn].a, IBV_WR_RDMA_WRITE, i, 0, 16, 64, 0));
			be_late();
		}
		while ((found = ibv_poll_cq(cq, 4, wc)) == 0)
			;
		CHECK(found == 1 || found == 2, "found %d", found);
		for (int i = 0; i < found; i++)
			EQ(wc[i].wr_id, i + 1);
		if (found == 1)
			WANT(cq, 2, IBV_WC_SUCCESS);
	}
	sync_ends();
	close_all(p, QPS, cq);
}

/* ibv_poll_cq(3): fewer than were asked for means that there are no more. Programs rely on it before they sleep. */
static void fewer_than_asked_for_means_no_more(void)
{
	enum { QPS = 10 };
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 256, NULL, NULL, 0));
	struct end_cfg c = { .cq = cq, .len = 4096 };
	struct pair p[QPS];

	for (int q = 0; q < QPS; q++) {
		p[q] = pair_open(NULL, &c);
		for (int i = 0; p[q].b && i < 2; i++)
			OK(post_receive(p[q].b, q, 64, 64));
	}
	sync_ends();
	/* One that had something is looked at first. */
	if (p[0].a) {
		OK(post_op(p[0].a, IBV_WR_SEND, 1, 0, 0, 64, 0));
		WANT(p[0].a->scq, 1, IBV_WC_SUCCESS);
	}
	if (p[0].b)
		WANT(cq, 0, IBV_WC_SUCCESS);
	sync_ends();
	for (int q = 0; q < QPS && p[q].a; q++) {
		OK(post_op(p[q].a, IBV_WR_SEND, 2, 0, 0, 64, 0));
		WANT(p[q].a->scq, 2, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p[0].b) {
		struct ibv_wc wc[2 * QPS];
		EQ(ibv_poll_cq(cq, 2 * QPS, wc), QPS);
	}
	sync_ends();
	close_all(p, QPS, cq);
}

/* A queue pair that gets the place of a destroyed one on a CQ of many is heard, whatever that one left there. */
static void a_new_queue_pair_in_an_old_ones_place(void)
{
	enum { QPS = 10, TURNS = 20 };
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 256, NULL, NULL, 0));
	struct end_cfg c = { .cq = cq, .len = 4096 };
	struct pair p[QPS];

	for (int q = 0; q < QPS; q++)
		p[q] = pair_open(NULL, &c);
	for (int turn = 0; turn < TURNS; turn++) {
		struct pair *one = &p[turn % 3];

		if (one->b)
			OK(post_receive(one->b, (uint64_t)turn, 64, 64));
		sync_ends();
		if (one->a) {
			OK(post_op(one->a, IBV_WR_SEND, 1, 0, 0, 64, 0));
			WANT(one->a->scq, 1, IBV_WC_SUCCESS);
		}
		if (one->b)
			WANT(cq, (uint64_t)turn, IBV_WC_SUCCESS);
		/* Sometimes at once, sometimes when the CQ has found nothing for long. */
		for (int i = 0; one->b && i < turn % 4 * 20; i++)
			EMPTY(cq);
		sync_ends();
		close_pair(one);
		*one = pair_open(NULL, &c);
	}
	sync_ends();
	close_all(p, QPS, cq);
}

/* ---- many small messages ----------------------------------------------------------------------------------------- */

static void ping_pong(void)
{
	enum { TURNS = 3000, LEN = 200 };
	struct end_cfg c = { .send_wr = 4, .recv_wr = 4, .len = 4 * LEN };
	struct pair p = pair_open(&c, &c);

	if (p.a)
		OK(post_receive(p.a, 0, LEN, LEN));
	if (p.b)
		OK(post_receive(p.b, 0, LEN, LEN));
	sync_ends();
	for (uint64_t i = 0; i < TURNS; i++) {
		size_t len = 1 + i % LEN;
		struct end *from[2] = { p.a, p.b }, *to[2] = { p.b, p.a };

		for (uint64_t way = 0; way < 2; way++) {
			if (from[way]) {
				fill(from[way]->buf, len, 2 * i + way);
				OK(post_op(from[way], IBV_WR_SEND, i, 0, len, 0, 0));
			}
			if (to[way]) {
				EQ(WANT(to[way]->rcq, i, IBV_WC_SUCCESS).byte_len, len);
				SAME(to[way]->buf + LEN, len, 2 * i + way);
				OK(post_receive(to[way], i + 1, LEN, LEN));
			}
			if (from[way])
				WANT(from[way]->scq, i, IBV_WC_SUCCESS);
		}
	}
}

/* Both ends stream at once through short queues, which wrap thousands of times. */
struct stream {
	struct end *e;
	uint64_t sent, acked, received;
};

enum { STREAM = 20000, DEPTH = 16, SLOT = 64 };

static void stream_step(struct stream *s, uint64_t out, uint64_t in)
{
	struct ibv_wc wc;
	struct end *e = s->e;

	while (s->sent < STREAM && s->sent < s->acked + DEPTH / 2) {
		size_t slot = (s->sent % DEPTH) * SLOT;

		fill(e->buf + slot, SLOT, out ^ s->sent);
		OK(post_op(e, IBV_WR_SEND, s->sent++, slot, SLOT, 0, 0));
	}
	while (ibv_poll_cq(e->scq, 1, &wc) == 1) {
		EQ(wc.status, IBV_WC_SUCCESS);
		EQ(wc.wr_id, s->acked++);
	}
	while (ibv_poll_cq(e->rcq, 1, &wc) == 1) {
		size_t slot = (DEPTH + s->received % DEPTH) * SLOT;

		EQ(wc.status, IBV_WC_SUCCESS);
		EQ(wc.wr_id, s->received);
		SAME(e->buf + slot, SLOT, in ^ s->received);
		OK(post_receive(e, DEPTH + s->received++, slot, SLOT));
	}
}

static void stream_both_ways(void)
{
	struct end_cfg c = { .send_wr = DEPTH, .recv_wr = DEPTH, .len = 2 * DEPTH * SLOT };
	struct pair p = pair_open(&c, &c);
	struct stream s[2] = { { .e = p.a }, { .e = p.b } };
	const uint64_t tag[2] = { 1ull << 40, 1ull << 41 };
	double until = now() + 50;
	bool more = true;

	for (int i = 0; i < 2; i++)
		for (uint64_t k = 0; s[i].e && k < DEPTH; k++)
			OK(post_receive(s[i].e, k, (DEPTH + k) * SLOT, SLOT));
	sync_ends();
	while (more) {
		more = false;
		for (int i = 0; i < 2; i++)
			if (s[i].e && (s[i].acked < STREAM || s[i].received < STREAM)) {
				stream_step(&s[i], tag[i], tag[1 - i]);
				more = true;
			}
		CHECK(now() < until, "stuck at %" PRIu64 "/%" PRIu64, s[0].acked + s[1].acked, s[0].received + s[1].received);
	}
}

/* ---- full queues ------------------------------------------------------------------------------------------------- */

/*
 * A chain longer than the queue: what fits is posted, bad_wr is the first that did not, the result is ENOMEM.
 * The QP is in RTS with an RNR'd send at the head, so nothing drains.
 */
static void send_queue_full(void)
{
	enum { CHAIN = 4096 };
	struct end_cfg c = { .send_wr = 16 };
	struct pair p = pair_open(&c, &c);
	uint64_t fitted = 0;

	if (p.a) {
		static struct ibv_send_wr w[CHAIN];
		struct ibv_send_wr *bad = NULL;
		struct ibv_qp_attr attr;
		struct ibv_qp_init_attr init;

		OK(ibv_query_qp(p.a->qp, &attr, IBV_QP_CAP, &init));
		CHECK(init.cap.max_send_wr >= 16 && init.cap.max_send_wr < CHAIN, "got %u", init.cap.max_send_wr);
		for (uint64_t i = 0; i < CHAIN; i++)
			w[i] = (struct ibv_send_wr){ .wr_id = i, .opcode = IBV_WR_SEND, .next = i + 1 < CHAIN ? &w[i + 1] : NULL };
		RC(ibv_post_send(p.a->qp, w, &bad), ENOMEM);
		CHECK(bad >= w && bad < w + CHAIN, "bad_wr is not in the chain");
		fitted = (uint64_t)(bad - w);
		CHECK(fitted >= 16 && fitted <= init.cap.max_send_wr, "%" PRIu64 " of %u fitted", fitted, init.cap.max_send_wr);
		bad = NULL;
		RC(ibv_post_send(p.a->qp, &w[CHAIN - 1], &bad), ENOMEM);
		CHECK(bad == &w[CHAIN - 1], "bad_wr is not the only one");
	}
	fitted = from_a(fitted);
	for (uint64_t i = 0; p.b && i < fitted; i += 16) {
		/* Receives in portions, so that this queue's own limit does not matter. */
		for (uint64_t k = i; k < fitted && k < i + 16; k++)
			OK(post_receive(p.b, k, 0, 0));
		for (uint64_t k = i; k < fitted && k < i + 16; k++)
			EQ(WANT(p.b->rcq, k, IBV_WC_SUCCESS).byte_len, 0);
	}
	for (uint64_t i = 0; p.a && i < fitted; i++)
		WANT(p.a->scq, i, IBV_WC_SUCCESS);
	if (p.a)
		EMPTY(p.a->scq);
}

static void receive_queue_full(void)
{
	enum { CHAIN = 4096 };
	static struct ibv_recv_wr w[CHAIN];
	struct ibv_recv_wr *bad = NULL;
	struct end_cfg c = { .recv_wr = 16 };
	struct pair p = pair_loopback(&c, &c);
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;

	OK(qp_init(p.a));
	OK(ibv_query_qp(p.a->qp, &attr, IBV_QP_CAP, &init));
	for (uint64_t i = 0; i < CHAIN; i++)
		w[i] = (struct ibv_recv_wr){ .wr_id = i, .next = i + 1 < CHAIN ? &w[i + 1] : NULL };
	RC(ibv_post_recv(p.a->qp, w, &bad), ENOMEM);
	CHECK(bad >= w + 16 && bad <= w + init.cap.max_recv_wr, "%td of %u fitted", bad - w, init.cap.max_recv_wr);
	struct ibv_recv_wr *first = bad;
	RC(ibv_post_recv(p.a->qp, &w[CHAIN - 1], &bad), ENOMEM);
	CHECK(bad == &w[CHAIN - 1], "bad_wr is not the only one");
	OK(qp_set_state(p.a->qp, IBV_QPS_ERR));
	for (struct ibv_recv_wr *r = w; r < first; r++)
		WANT(p.a->rcq, r->wr_id, IBV_WC_WR_FLUSH_ERR);
	EMPTY(p.a->rcq);
}

/* A slot is free again once its completion was polled, also when the ones before it were not signalled. */
static void slots_come_back(void)
{
	struct end_cfg c = { .send_wr = 16, .unsignalled = 1 };
	struct pair p = pair_open(&c, &c);

	for (uint64_t turn = 0; p.a && turn < 500; turn++) {
		for (int i = 0; i < 15; i++)
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, 0, 0, 16, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, turn, 0, 16, 0, IBV_SEND_SIGNALED));
		WANT(p.a->scq, turn, IBV_WC_SUCCESS);
	}
}

/* A receive is seen within a bounded number of polls, however many sends of the same QP complete meanwhile. */
static void sends_do_not_hide_a_receive(void)
{
	struct end_cfg c = { .one_cq = 1 };
	struct pair p = pair_open(&c, &c);

	if (p.a)
		OK(post_receive(p.a, 99, 0, 64));
	sync_ends();
	if (p.b) {
		OK(post_op(p.b, IBV_WR_SEND, 1, 0, 64, 0, 0));
		WANT(p.b->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	for (int i = 0; p.a && i < 64; i++)
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 16, 64, 0));
	for (int i = 0; p.a && WAIT(p.a->scq).wr_id != 99; i++) {
		CHECK(i < 1000, "only sends");
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 16, 64, 0));
	}
	sync_ends();
}

static const struct test_case cases[] = {
	{ "writes_before_send", writes_before_send, 0 },
	{ "last_byte_polling", last_byte_polling, 0 },
	{ "read_after_write", read_after_write, 0 },
	{ "completion_order", completion_order, 0 },
	{ "eight_qps_one_cq", eight_qps_one_cq, 0 },
	{ "completions_do_not_hide_others", completions_do_not_hide_others, 0 },
	{ "fewer_than_asked_for_means_no_more", fewer_than_asked_for_means_no_more, 0 },
	{ "a_new_queue_pair_in_an_old_ones_place", a_new_queue_pair_in_an_old_ones_place, 0 },
	{ "ping_pong", ping_pong, 0 },
	{ "stream_both_ways", stream_both_ways, 0 },
	{ "send_queue_full", send_queue_full, 0 },
	{ "receive_queue_full", receive_queue_full, LOCAL },
	{ "slots_come_back", slots_come_back, 0 },
	{ "sends_do_not_hide_a_receive", sends_do_not_hide_a_receive, 0 },
};
SUITE(cases)
