/* Large transfers and many threads: nobody is held, nothing is mixed up. */
#include "common.h"

#include <pthread.h>

static size_t large(void)
{
	size_t want = 64u << 20;

	return port_attr.max_msg_sz < want ? port_attr.max_msg_sz : want;
}

/* ---- one large message ------------------------------------------------------------------------------------------- */

/* The poster goes to sleep right after posting; the transfer goes on without it. */
static void large_one(enum ibv_wr_opcode op)
{
	size_t len = large();
	struct end_cfg c = { .with_channel = 1, .len = len, .timeout = 20 };
	struct pair p = pair_open(&c, &c);
	struct end *source = op == IBV_WR_RDMA_READ ? p.b : p.a, *sink = op == IBV_WR_RDMA_READ ? p.a : p.b;

	if (source)
		fill(source->buf, len, 1);
	if (p.b && op == IBV_WR_SEND)
		OK(post_receive(p.b, 2, 0, len));
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, op, 1, 0, len, 0, 0));
		struct ibv_wc wc = SLEEP_FOR_WC(p.a->channel, p.a->scq);
		EQ(wc.status, IBV_WC_SUCCESS);
		EQ(wc.wr_id, 1);
	}
	if (p.b && op == IBV_WR_SEND)
		EQ(WANT(p.b->rcq, 2, IBV_WC_SUCCESS).byte_len, len);
	sync_ends();
	if (sink) {
		SAME(sink->buf, len, 1);
		MARGINS(sink);
	}
}

static void large_write(void) { large_one(IBV_WR_RDMA_WRITE); }
static void large_read(void) { large_one(IBV_WR_RDMA_READ); }
static void large_send(void) { large_one(IBV_WR_SEND); }

/* Small requests behind a large one wait for it, in order; one to another QP does not. */
static void small_behind_large(void)
{
	size_t len = large() / 2;
	struct end_cfg c = { .len = len, .timeout = 20 };
	struct pair p = pair_open(&c, &c), other = pair_open(NULL, NULL);

	if (p.b)
		OK(post_receive(p.b, 7, 0, 64));
	sync_ends();
	if (p.a) {
		fill(p.a->buf, len, 1);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, len, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_READ, 2, 0, 64, len - 64, 0));
		OK(post_op(p.a, IBV_WR_SEND, 3, 0, 0, 0, 0));
		OK(post_op(other.a, IBV_WR_RDMA_WRITE, 4, 0, 64, 0, 0));
		WANT(other.a->scq, 4, IBV_WC_SUCCESS);
		for (uint64_t i = 1; i <= 3; i++)
			WANT(p.a->scq, i, IBV_WC_SUCCESS);
	}
	if (p.b) {
		EQ(WANT(p.b->rcq, 7, IBV_WC_SUCCESS).byte_len, 0);
		SAME(p.b->buf, len, 1);
	}
	if (p.a) {
		uint8_t tail[64];

		fill(p.a->buf, len, 1); /* what the read brought is the end of what was written */
		memcpy(tail, p.a->buf + len - 64, 64);
		OK(post_op(p.a, IBV_WR_RDMA_READ, 5, 0, 64, len - 64, 0));
		WANT(p.a->scq, 5, IBV_WC_SUCCESS);
		EQ(memcmp(p.a->buf, tail, 64), 0);
	}
	sync_ends();
}

static void large_both_ways(void)
{
	size_t len = large() / 4;
	struct end_cfg c = { .len = 2 * len, .timeout = 20 };
	struct pair p = pair_open(&c, &c);
	struct end *ends[2] = { p.a, p.b };

	for (uint64_t i = 0; i < 2; i++)
		if (ends[i]) {
			fill(ends[i]->buf, len, i);
			OK(post_op(ends[i], IBV_WR_RDMA_WRITE, 1, 0, len, len, 0));
		}
	for (uint64_t i = 0; i < 2; i++)
		if (ends[i])
			WANT(ends[i]->scq, 1, IBV_WC_SUCCESS);
	sync_ends();
	for (uint64_t i = 0; i < 2; i++)
		if (ends[i]) {
			SAME(ends[i]->buf, len, i);
			SAME(ends[i]->buf + len, len, 1 - i);
			MARGINS(ends[i]);
		}
}

/* The QP fails while a large transfer is under way: it ends, and nothing lands after the flush was seen. */
static void error_during_large(void)
{
	size_t len = large();
	struct end_cfg c = { .len = len, .timeout = 20 };
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		fill(p.a->buf, len, 1);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, len, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, len, 0, 0));
		OK(qp_set_state(p.a->qp, IBV_QPS_ERR));
		for (uint64_t i = 1; i <= 2; i++) {
			struct ibv_wc wc = WAIT(p.a->scq);

			EQ(wc.wr_id, i);
			CHECK(wc.status == IBV_WC_WR_FLUSH_ERR || wc.status == IBV_WC_SUCCESS, "got %d", wc.status);
		}
		EMPTY(p.a->scq);
	}
	sync_ends();
	if (p.b)
		MARGINS(p.b);
}

static void longer_than_max_msg_sz(void)
{
	enum { PIECES = 16 };
	size_t piece = ((size_t)port_attr.max_msg_sz + PIECES) / PIECES;

	if (piece > 128u << 20)
		skip_case("max_msg_sz is %u, too large to exceed here", port_attr.max_msg_sz);
	struct end_cfg c = { .len = piece, .send_sge = PIECES };
	struct pair p = pair_open(&c, &c);
	if (p.a) {
		struct ibv_sge s[PIECES];
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = s, .num_sge = PIECES, .opcode = IBV_WR_RDMA_WRITE };

		for (size_t i = 0; i < PIECES; i++)
			s[i] = sge(p.a, 0, piece);
		w.wr.rdma.remote_addr = p.a->peer.addr;
		w.wr.rdma.rkey = p.a->peer.rkey;
		int rc = post(p.a, &w, NULL);
		if (rc)
			EQ(rc, EINVAL);
		else {
			struct ibv_wc wc = WAIT(p.a->scq);

			/* the responder's region is shorter too: it may be the one to refuse */
			CHECK(wc.status == IBV_WC_LOC_LEN_ERR || wc.status == IBV_WC_REM_INV_REQ_ERR || wc.status == IBV_WC_REM_ACCESS_ERR,
			      "got '%s'", ibv_wc_status_str(wc.status));
		}
	}
	sync_ends();
	if (p.b)
		ALL(p.b->buf, p.b->len < 4096 ? p.b->len : 4096, GUARD);
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

enum { THREADS = 4, EACH = 400, CELL = 64 };

struct worker {
	pthread_t thread;
	struct end *e;
	size_t index;
};

/* Each request of a thread carries its number into a cell of its own. */
static void *post_many(void *arg)
{
	struct worker *w = arg;
	struct ibv_sge s;

	for (uint64_t i = 0; i < EACH;) {
		size_t cell = (w->index * EACH + i) * CELL;

		fill(w->e->buf + cell, CELL, w->index << 32 | i);
		s = sge(w->e, cell, CELL);
		struct ibv_send_wr wr = { .wr_id = w->index << 32 | i, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE }, *bad;
		wr.wr.rdma.remote_addr = w->e->peer.addr + cell;
		wr.wr.rdma.rkey = w->e->peer.rkey;
		int rc = ibv_post_send(w->e->qp, &wr, &bad);
		if (rc)
			EQ(rc, ENOMEM); /* full until the collector polls */
		i += rc == 0;
	}
	return NULL;
}

/* Runs the workers and collects their completions: each one's in order, all of them there. */
static void collect(struct worker *w, struct ibv_cq *cq)
{
	uint64_t next[THREADS] = { 0 };

	for (size_t i = 0; i < THREADS; i++)
		EQ(pthread_create(&w[i].thread, NULL, post_many, &w[i]), 0);
	for (int n = 0; n < THREADS * EACH; n++) {
		struct ibv_wc wc = WAIT(cq);
		uint64_t who = wc.wr_id >> 32;

		EQ(wc.status, IBV_WC_SUCCESS);
		CHECK(who < THREADS, "got %" PRIu64, who);
		EQ(wc.qp_num, w[who].e->qp->qp_num);
		EQ(wc.wr_id & 0xffffffff, next[who]++);
	}
	for (size_t i = 0; i < THREADS; i++)
		EQ(pthread_join(w[i].thread, NULL), 0);
	EMPTY(cq);
}

static void threads_own_qps_one_cq(void)
{
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 2 * THREADS * EACH, NULL, NULL, 0));
	struct end_cfg a = { .cq = cq, .len = THREADS * EACH * CELL }, b = { .len = THREADS * EACH * CELL };
	struct pair p[THREADS];
	struct worker w[THREADS];

	for (size_t i = 0; i < THREADS; i++) {
		p[i] = pair_open(&a, &b);
		w[i] = (struct worker){ .e = p[i].a, .index = i };
	}
	if (is_a)
		collect(w, cq);
	sync_ends();
	for (uint64_t i = 0; i < THREADS; i++)
		for (uint64_t k = 0; p[i].b && k < EACH; k++)
			SAME(p[i].b->buf + (i * EACH + k) * CELL, CELL, i << 32 | k);
	for (size_t i = 0; i < THREADS; i++)
		if (p[i].a)
			end_destroy(p[i].a);
	OK(ibv_destroy_cq(cq));
}

/* Every verb is thread-safe: several threads may post to one QP. */
static void threads_on_one_qp(void)
{
	struct end_cfg c = { .len = THREADS * EACH * CELL, .cqe = 2 * THREADS * EACH };
	struct pair p = pair_open(&c, &c);
	struct worker w[THREADS];

	for (size_t i = 0; i < THREADS; i++)
		w[i] = (struct worker){ .e = p.a, .index = i };
	if (p.a)
		collect(w, p.a->scq);
	sync_ends();
	for (uint64_t i = 0; p.b && i < THREADS * EACH; i++)
		SAME(p.b->buf + i * CELL, CELL, (i / EACH) << 32 | i % EACH);
}

/* Objects made and destroyed by many threads at once; their regions' first and last pages are shared by two PDs. */
static void *make_and_destroy(void *arg)
{
	uint8_t *buf = arg;

	for (int i = 0; i < 40; i++) {
		struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
		struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
		struct ibv_qp_init_attr a = qp_init_attr(NULL, cq, cq);
		struct ibv_qp *qp = MADE(ibv_create_qp(pd, &a));
		struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, 9000, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));

		OK(ibv_dereg_mr(mr));
		OK(ibv_destroy_qp(qp));
		OK(ibv_destroy_cq(cq));
		OK(ibv_dealloc_pd(pd));
	}
	return NULL;
}

static void threads_making_objects(void)
{
	pthread_t thread[THREADS];
	uint8_t *buf = MADE(malloc(9000 * THREADS));

	for (size_t i = 0; i < THREADS; i++)
		EQ(pthread_create(&thread[i], NULL, make_and_destroy, buf + 9000 * i), 0);
	for (size_t i = 0; i < THREADS; i++)
		EQ(pthread_join(thread[i], NULL), 0);
	free(buf);
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(large_write), CASE(large_read), CASE(large_send), CASE(small_behind_large), CASE(large_both_ways), CASE(error_during_large),
	CASE(longer_than_max_msg_sz), CASE(threads_own_qps_one_cq), CASE(threads_on_one_qp),
	{ "threads_making_objects", threads_making_objects, LOCAL },
};
SUITE(cases)
