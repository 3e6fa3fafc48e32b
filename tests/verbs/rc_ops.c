/* RC: every operation moves exactly the bytes asked for and reports them, by ibv_post_send and by ibv_wr_*. */
#include "common.h"

#include <arpa/inet.h>

enum { ALL_OPS = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM |
		 IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD };

/* Each body becomes two cases: the same work through either interface. */
#define BOTH(body)                                                                                                      \
	static void body##_post(void) { body(0); }                                                                      \
	static void body##_wr(void) { body(ALL_OPS); }
#define ROWS(body) { #body "/post", body##_post, 0 }, { #body "/wr", body##_wr, 0 }

static const uint32_t IMM = 0x01020304;
static const size_t SIZES[] = { 0, 1, 7, 8, 63, 64, 4095, 4096, 4097, 65536, (1 << 20) + 3, 8 << 20 };
enum { SRC = 3, DST = 5, SLACK = 256, BIG = (8 << 20) + 2 * SLACK };

static void guarded(const char *file, int line, const struct end *e, size_t off, size_t len)
{
	all_at(file, line, e->buf, off, GUARD);
	all_at(file, line, e->buf + off + len, SLACK, GUARD);
	margins_at(file, line, e);
}
#define GUARDED(e, off, len) guarded(__FILE__, __LINE__, e, off, len)

/* One transfer of one size, checked at the end that receives the bytes. */
static void transfer(struct pair *p, enum ibv_wr_opcode op, size_t len, uint64_t stream)
{
	bool reads = op == IBV_WR_RDMA_READ, sends = op == IBV_WR_SEND || op == IBV_WR_SEND_WITH_IMM;
	bool consumes = sends || op == IBV_WR_RDMA_WRITE_WITH_IMM;

	if (p->b) {
		reset_buf(p->b);
		if (reads)
			fill(p->b->buf + DST, len, stream);
		if (consumes)
			OK(post_receive(p->b, stream, DST, sends ? len : 0));
	}
	sync_ends();
	if (p->a) {
		reset_buf(p->a);
		if (!reads)
			fill(p->a->buf + SRC, len, stream);
		OK(post_op(p->a, op, stream, SRC, len, DST, 0));
		WANT(p->a->scq, stream, IBV_WC_SUCCESS);
		SAME(p->a->buf + SRC, len, stream);
		GUARDED(p->a, SRC, len);
	}
	if (p->b && consumes)
		EQ(WANT(p->b->rcq, stream, IBV_WC_SUCCESS).byte_len, len);
	sync_ends();
	if (p->b) {
		SAME(p->b->buf + DST, len, stream);
		GUARDED(p->b, DST, len);
	}
}

static void all_sizes(enum ibv_wr_opcode op, uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops, .len = BIG };
	struct pair p = pair_open(&c, &c);

	for (size_t i = 0; i < COUNT(SIZES); i++)
		if (SIZES[i] <= port_attr.max_msg_sz)
			transfer(&p, op, SIZES[i], i + 1);
}

static void send_sizes(uint64_t ops) { all_sizes(IBV_WR_SEND, ops); }
static void send_imm_sizes(uint64_t ops) { all_sizes(IBV_WR_SEND_WITH_IMM, ops); }
static void write_sizes(uint64_t ops) { all_sizes(IBV_WR_RDMA_WRITE, ops); }
static void write_imm_sizes(uint64_t ops) { all_sizes(IBV_WR_RDMA_WRITE_WITH_IMM, ops); }
static void read_sizes(uint64_t ops) { all_sizes(IBV_WR_RDMA_READ, ops); }
BOTH(send_sizes)
BOTH(send_imm_sizes)
BOTH(write_sizes)
BOTH(write_imm_sizes)
BOTH(read_sizes)

/* ---- scatter and gather ------------------------------------------------------------------------------------------ */

enum { SG_MAX = 16, SG_TOTAL = 5003, SG_LEN = SG_TOTAL + 17 * SG_MAX + 64 };

/* Cuts SG_TOTAL bytes into n pieces of at least 1, with odd gaps between, in an order that is not that of addresses. */
static void cut(const struct end *e, struct ibv_sge *list, int n, uint64_t *rnd)
{
	size_t left = SG_TOTAL, off = 1, step = (size_t)n > 2 ? 2 : 1;

	for (int i = 0; i < n; i++) {
		size_t keep = (size_t)(n - 1 - i), room = (left - keep) / (keep + 1) * 2;
		size_t len = keep ? 1 + next_random(rnd) % (room < left - keep ? room : left - keep) : left;

		list[i] = sge(e, off, len);
		off += len + 1 + next_random(rnd) % 16;
		left -= len;
	}
	for (size_t i = 0; i + step < (size_t)n; i += step + 1) {
		struct ibv_sge t = list[i];

		list[i] = list[i + step];
		list[i + step] = t;
	}
}

static void gather(uint8_t *flat, const struct ibv_sge *list, int n)
{
	for (int i = 0; i < n; flat += list[i++].length)
		memcpy(flat, (void *)(uintptr_t)list[i].addr, list[i].length);
}

static void scatter(const uint8_t *flat, const struct ibv_sge *list, int n)
{
	for (int i = 0; i < n; flat += list[i++].length)
		memcpy((void *)(uintptr_t)list[i].addr, flat, list[i].length);
}

/* The bytes between the pieces must still be GUARD: paint the pieces GUARD and look at all of it. */
static void gaps_at(int line, const struct end *e, const struct ibv_sge *list, int n)
{
	for (int i = 0; i < n; i++)
		memset((void *)(uintptr_t)list[i].addr, GUARD, list[i].length);
	all_at(__FILE__, line, e->buf, e->len, GUARD);
	margins_at(__FILE__, line, e);
}

static void sg_one(struct pair *p, enum ibv_wr_opcode op, int na, int nb, uint64_t stream)
{
	struct ibv_sge la[SG_MAX], lb[SG_MAX];
	static uint8_t flat[SG_TOTAL];
	uint64_t rnd = seed ^ stream;
	bool sends = op == IBV_WR_SEND, reads = op == IBV_WR_RDMA_READ;

	if (p->b) {
		reset_buf(p->b);
		cut(p->b, lb, nb, &rnd);
		struct ibv_recv_wr r = { .wr_id = stream, .sg_list = lb, .num_sge = nb }, *bad;
		if (sends)
			OK(ibv_post_recv(p->b->qp, &r, &bad));
		if (reads)
			fill(p->b->buf + DST, SG_TOTAL, stream);
	}
	sync_ends();
	if (p->a) {
		reset_buf(p->a);
		cut(p->a, la, na, &rnd);
		fill(flat, SG_TOTAL, stream);
		if (!reads)
			scatter(flat, la, na);
		struct ibv_send_wr w = { .wr_id = stream, .sg_list = la, .num_sge = na, .opcode = op };
		w.wr.rdma.remote_addr = p->a->peer.addr + DST;
		w.wr.rdma.rkey = p->a->peer.rkey;
		OK(post(p->a, &w, NULL));
		WANT(p->a->scq, stream, IBV_WC_SUCCESS);
		gather(flat, la, na);
		SAME(flat, SG_TOTAL, stream);
		gaps_at(__LINE__, p->a, la, na);
	}
	if (p->b && sends)
		EQ(WANT(p->b->rcq, stream, IBV_WC_SUCCESS).byte_len, SG_TOTAL);
	sync_ends();
	if (p->b && sends) {
		gather(flat, lb, nb);
		SAME(flat, SG_TOTAL, stream);
		gaps_at(__LINE__, p->b, lb, nb);
	} else if (p->b) {
		SAME(p->b->buf + DST, SG_TOTAL, stream);
	}
}

static void sg_lists(uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops, .send_sge = SG_MAX, .recv_sge = SG_MAX, .len = SG_LEN };
	struct pair p = pair_open(&c, &c);

	/* rdma-core 44's soft-RoCE takes n times the first entry's length for the length of a list. */
	int most = is_rxe && ops ? 1 : SG_MAX;

	for (int n = 1; n <= most; n++) {
		sg_one(&p, IBV_WR_SEND, n, SG_MAX + 1 - n, 100 + (uint64_t)n);
		sg_one(&p, IBV_WR_SEND, n, n, 200 + (uint64_t)n);
		sg_one(&p, IBV_WR_RDMA_WRITE, n, 1, 300 + (uint64_t)n);
		sg_one(&p, IBV_WR_RDMA_READ, n, 1, 400 + (uint64_t)n);
	}
}
BOTH(sg_lists)

/* ---- flags ------------------------------------------------------------------------------------------------------- */

/* Inline data is taken during the call: from memory that is not registered, and overwritten at once. */
static void inline_data(uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops, .inline_data = 128, .len = 4096 };
	struct pair p = pair_open(&c, &c);

	for (size_t len = 1; len <= 128; len += len < 8 ? 1 : 15) {
		if (p.b) {
			reset_buf(p.b);
			OK(post_receive(p.b, len, DST, 128));
		}
		sync_ends();
		if (p.a) {
			uint8_t bytes[128];
			struct ibv_sge s = { .addr = (uintptr_t)bytes, .length = (uint32_t)len, .lkey = 0xdeadbeef };
			struct ibv_send_wr w = { .wr_id = len, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND, .send_flags = IBV_SEND_INLINE };

			fill(bytes, len, len);
			OK(post(p.a, &w, NULL));
			memset(bytes, 0, sizeof(bytes));
			WANT(p.a->scq, len, IBV_WC_SUCCESS);
		}
		if (p.b) {
			EQ(WANT(p.b->rcq, len, IBV_WC_SUCCESS).byte_len, len);
			SAME(p.b->buf + DST, len, len);
			GUARDED(p.b, DST, len);
		}
	}
}
BOTH(inline_data)

static void inline_too_long(void)
{
	struct end_cfg c = { .inline_data = 32, .len = 1 << 20 };
	struct pair p = pair_open(&c, &c);

	if (!p.a)
		return;
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;
	OK(ibv_query_qp(p.a->qp, &attr, IBV_QP_CAP, &init));
	CHECK(init.cap.max_inline_data >= 32 && init.cap.max_inline_data < 1 << 20, "got %u", init.cap.max_inline_data);
	int rc = post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, init.cap.max_inline_data + 1, 0, IBV_SEND_INLINE);
	CHECK(rc == EINVAL || rc == ENOMEM, "got %d", rc);
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, init.cap.max_inline_data, 0, IBV_SEND_INLINE));
	WANT(p.a->scq, 2, IBV_WC_SUCCESS);
}

static void unsignalled(uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops, .unsignalled = 1 };
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		fill(p.a->buf, 512, 1);
		for (uint64_t i = 0; i < 8; i++)
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, i, i * 64, 64, i * 64, i == 3 || i == 7 ? IBV_SEND_SIGNALED : 0));
		WANT(p.a->scq, 3, IBV_WC_SUCCESS);
		WANT(p.a->scq, 7, IBV_WC_SUCCESS);
		EMPTY(p.a->scq);
	}
	sync_ends();
	if (p.b) {
		SAME(p.b->buf, 512, 1);
		ALL(p.b->buf + 512, SLACK, GUARD);
	}
}

/* sq_sig_all asks for a completion of everything, flagged or not. */
static void sig_all(uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops };
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		for (uint64_t i = 0; i < 8; i++)
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, i, 0, 8, 0, i % 2 ? IBV_SEND_SIGNALED : 0));
		for (uint64_t i = 0; i < 8; i++)
			WANT(p.a->scq, i, IBV_WC_SUCCESS);
		EMPTY(p.a->scq);
	}
}
BOTH(unsignalled)
BOTH(sig_all)

/* A fenced operation starts after the reads before it: it can send what they fetched. */
static void fence(uint64_t ops)
{
	enum { LEN = 64 << 10, TURNS = 16 };
	struct end_cfg c = { .send_ops = ops, .len = 2 * LEN, .send_wr = 2 * TURNS };
	struct pair p = pair_open(&c, &c);

	if (p.b)
		fill(p.b->buf, LEN, 9);
	sync_ends();
	if (p.a) {
		for (uint64_t i = 0; i < TURNS; i++) {
			reset_buf(p.a);
			OK(post_op(p.a, IBV_WR_RDMA_READ, 2 * i, 0, LEN, 0, 0));
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2 * i + 1, 0, LEN, LEN, IBV_SEND_FENCE));
			WANT(p.a->scq, 2 * i, IBV_WC_SUCCESS);
			WANT(p.a->scq, 2 * i + 1, IBV_WC_SUCCESS);
		}
	}
	sync_ends();
	if (p.b)
		SAME(p.b->buf + LEN, LEN, 9);
}
BOTH(fence)

/* ---- completions ------------------------------------------------------------------------------------------------- */

static void check_requester(struct end *e, enum ibv_wr_opcode op, uint64_t wr_id, enum ibv_wc_opcode want)
{
	size_t len = is_atomic(op) ? 8 : 100;
	struct ibv_sge s = sge(e, 0, len);
	struct ibv_send_wr w = { .wr_id = wr_id, .sg_list = &s, .num_sge = 1, .opcode = op, .imm_data = htonl(IMM) };

	if (is_atomic(op)) {
		w.wr.atomic.remote_addr = e->peer.addr + 1024;
		w.wr.atomic.rkey = e->peer.rkey;
	} else {
		w.wr.rdma.remote_addr = e->peer.addr + 1024;
		w.wr.rdma.rkey = e->peer.rkey;
	}
	OK(post(e, &w, NULL));
	struct ibv_wc wc = WANT(e->scq, wr_id, IBV_WC_SUCCESS);
	EQ(wc.opcode, want);
	EQ(wc.qp_num, e->qp->qp_num);
	if (!is_rxe) /* which repeats a request's own immediate flag to its sender */
		EQ(wc.wc_flags & (IBV_WC_GRH | IBV_WC_WITH_IMM), 0);
	if (op == IBV_WR_RDMA_READ || is_atomic(op)) /* byte_len means nothing for the other requests */
		EQ(wc.byte_len, len);
}

static void check_receiver(struct end *e, uint64_t wr_id, enum ibv_wc_opcode want, bool imm)
{
	struct ibv_wc wc = WANT(e->rcq, wr_id, IBV_WC_SUCCESS);

	EQ(wc.opcode, want);
	EQ(wc.qp_num, e->qp->qp_num);
	EQ(wc.byte_len, 100);
	EQ(wc.wc_flags & (IBV_WC_WITH_IMM | IBV_WC_WITH_INV), imm ? IBV_WC_WITH_IMM : 0);
	if (!is_rxe) /* which says so of every packet; the flag is for UD only (man ibv_poll_cq) */
		EQ(wc.wc_flags & IBV_WC_GRH, 0);
	if (imm)
		EQ(ntohl(wc.imm_data), IMM);
}

static void wc_fields(uint64_t ops)
{
	struct end_cfg c = { .send_ops = ops };
	struct pair p = pair_open(&c, &c);

	if (p.b)
		for (uint64_t i = 1; i <= 3; i++)
			OK(post_receive(p.b, i, 0, 1000));
	sync_ends();
	if (p.a) {
		check_requester(p.a, IBV_WR_SEND, UINT64_MAX, IBV_WC_SEND);
		check_requester(p.a, IBV_WR_SEND_WITH_IMM, 0, IBV_WC_SEND);
		check_requester(p.a, IBV_WR_RDMA_WRITE_WITH_IMM, 1ull << 63, IBV_WC_RDMA_WRITE);
		check_requester(p.a, IBV_WR_RDMA_WRITE, 4, IBV_WC_RDMA_WRITE);
		check_requester(p.a, IBV_WR_RDMA_READ, 5, IBV_WC_RDMA_READ);
		check_requester(p.a, IBV_WR_ATOMIC_CMP_AND_SWP, 6, IBV_WC_COMP_SWAP);
		check_requester(p.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 7, IBV_WC_FETCH_ADD);
	}
	if (p.b) {
		check_receiver(p.b, 1, IBV_WC_RECV, false);
		check_receiver(p.b, 2, IBV_WC_RECV, true);
		check_receiver(p.b, 3, IBV_WC_RECV_RDMA_WITH_IMM, true);
		EMPTY(p.b->rcq);
	}
}
BOTH(wc_fields)

/* WRITE_WITH_IMM takes a receive but not its memory. */
static void write_imm_leaves_receive_buffer(void)
{
	struct pair p = pair_open(NULL, NULL);

	if (p.b)
		OK(post_receive(p.b, 1, 0, 1024));
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 64, 1);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE_WITH_IMM, 1, 0, 64, 2048, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	if (p.b) {
		EQ(WANT(p.b->rcq, 1, IBV_WC_SUCCESS).byte_len, 64);
		ALL(p.b->buf, 2048, GUARD);
		SAME(p.b->buf + 2048, 64, 1);
	}
}

/* ---- atomics: words are in the responder's own byte order -------------------------------------------------------- */

static uint64_t atomic(struct end *e, enum ibv_wr_opcode op, size_t remote_off, uint64_t compare_add, uint64_t swap)
{
	struct ibv_sge s = sge(e, 64, 8);
	struct ibv_send_wr w = { .wr_id = 77, .sg_list = &s, .num_sge = 1, .opcode = op };
	uint64_t old;

	w.wr.atomic.remote_addr = e->peer.addr + remote_off;
	w.wr.atomic.rkey = e->peer.rkey;
	w.wr.atomic.compare_add = compare_add;
	w.wr.atomic.swap = swap;
	reset_buf(e);
	OK(post(e, &w, NULL));
	WANT(e->scq, 77, IBV_WC_SUCCESS);
	memcpy(&old, e->buf + 64, 8);
	ALL(e->buf, 64, GUARD);
	ALL(e->buf + 72, 64, GUARD);
	return old;
}

static void atomics(uint64_t ops)
{
	const uint64_t first = 0x0102030405060708, second = 0xfffffffffffffff0;
	struct end_cfg c = { .send_ops = ops };
	struct pair p = pair_open(&c, &c);

	if (p.b)
		memcpy(p.b->buf + 128, &first, 8);
	sync_ends();
	if (p.a) {
		EQ(atomic(p.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 128, 0, 0), first);
		EQ(atomic(p.a, IBV_WR_ATOMIC_CMP_AND_SWP, 128, first + 1, 5), first);
		EQ(atomic(p.a, IBV_WR_ATOMIC_CMP_AND_SWP, 128, first, second), first);
		EQ(atomic(p.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 128, 0x20, 0), second);
		EQ(atomic(p.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 128, 1, 0), 0x10);
		EQ(atomic(p.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 128, (uint64_t)-2, 0), 0x11);
	}
	sync_ends();
	if (p.b) {
		uint64_t value;

		memcpy(&value, p.b->buf + 128, 8);
		EQ(value, 0x0f);
		ALL(p.b->buf, 128, GUARD);
		ALL(p.b->buf + 136, 1024, GUARD);
	}
}
BOTH(atomics)

enum { SUM_ROUNDS = 64, SUM_DEPTH = 16 };

static void add_round(struct end *e, int round, bool post_now)
{
	for (size_t k = 0; e && k < SUM_DEPTH; k++)
		if (post_now)
			OK(post_op(e, IBV_WR_ATOMIC_FETCH_AND_ADD, k, 8 * (k + (size_t)round * SUM_DEPTH), 8, 0, 0));
		else
			WANT(e->scq, k, IBV_WC_SUCCESS);
}

/* One adder's old values grow, and start below the total: none was seen twice by the same adder. */
static void old_values_grow(const struct end *e)
{
	const uint64_t *old = (const uint64_t *)e->buf;

	for (size_t k = 0; k < SUM_ROUNDS * SUM_DEPTH; k++) {
		CHECK(old[k] < 2 * SUM_ROUNDS * SUM_DEPTH, "got %" PRIu64, old[k]);
		CHECK(!k || old[k] > old[k - 1], "got %" PRIu64 " after %" PRIu64, old[k], old[k - 1]);
	}
}

/* Two processes (in --self: two QPs) add to one word at once; nothing is lost. */
static void atomics_sum(void)
{
	struct end_cfg c = { .rd_atomic = 4, .len = 8 * SUM_ROUNDS * SUM_DEPTH };
	struct pair p = pair_open(&c, &c);
	struct end *adder = NULL;

	if (p.b) {
		memset(p.b->buf, 0, 8);
		c.pd = p.b->pd;
		struct pair loop = pair_loopback(&c, &c);

		adder = loop.a;
		adder->peer.addr = p.b->me.addr;
		adder->peer.rkey = p.b->me.rkey;
		end_connect(loop.a);
		end_connect(loop.b);
	}
	sync_ends();
	for (int round = 0; round < SUM_ROUNDS; round++)
		for (int posting = 1; posting >= 0; posting--) {
			add_round(p.a, round, posting);
			add_round(adder, round, posting);
		}
	sync_ends();
	if (p.a)
		old_values_grow(p.a);
	if (p.b) {
		uint64_t value;

		old_values_grow(adder);
		memcpy(&value, p.b->buf, 8);
		EQ(value, 2 * SUM_ROUNDS * SUM_DEPTH);
	}
}

/* ---- what is particular to ibv_wr_* ------------------------------------------------------------------------------ */

static void wr_abort_posts_nothing(void)
{
	struct end_cfg c = { .send_ops = ALL_OPS };
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		ibv_wr_start(p.a->qpx);
		p.a->qpx->wr_id = 1;
		p.a->qpx->wr_flags = IBV_SEND_SIGNALED;
		ibv_wr_rdma_write(p.a->qpx, p.a->peer.rkey, p.a->peer.addr);
		ibv_wr_set_sge(p.a->qpx, p.a->mr->lkey, (uintptr_t)p.a->buf, 64);
		ibv_wr_abort(p.a->qpx);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 1024, 0));
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
		EMPTY(p.a->scq);
	}
}

static void wr_and_post_send_mix(void)
{
	struct end_cfg c = { .send_ops = ALL_OPS };
	struct pair p = pair_open(&c, &c);

	for (uint64_t i = 0; p.a && i < 6; i++) {
		struct ibv_qp_ex *qpx = p.a->qpx;

		p.a->qpx = i % 2 ? qpx : NULL; /* post() then uses ibv_post_send */
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, i, 0, 8, 0, 0));
		p.a->qpx = qpx;
	}
	for (uint64_t i = 0; p.a && i < 6; i++)
		WANT(p.a->scq, i, IBV_WC_SUCCESS);
}

static void plain_qp_is_not_ex(void)
{
	struct pair p = pair_loopback(NULL, NULL);

	CHECK(!ibv_qp_to_qp_ex(p.a->qp), "a QP made without send_ops_flags has no ibv_wr_* functions");
}

static const struct test_case cases[] = {
	ROWS(send_sizes),
	ROWS(send_imm_sizes),
	ROWS(write_sizes),
	ROWS(write_imm_sizes),
	ROWS(read_sizes),
	ROWS(sg_lists),
	ROWS(inline_data),
	{ "inline_too_long", inline_too_long, 0 },
	ROWS(unsignalled),
	ROWS(sig_all),
	ROWS(fence),
	ROWS(wc_fields),
	{ "write_imm_leaves_receive_buffer", write_imm_leaves_receive_buffer, 0 },
	ROWS(atomics),
	{ "atomics_sum", atomics_sum, 0 },
	{ "wr_abort_posts_nothing", wr_abort_posts_nothing, 0 },
	{ "wr_and_post_send_mix", wr_and_post_send_mix, 0 },
	{ "plain_qp_is_not_ex", plain_qp_is_not_ex, LOCAL },
};
SUITE(cases)
