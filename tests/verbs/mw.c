/* Memory windows: keys over a part of a region, that begin and end by requests in a send queue. */
#include "common.h"

#include <time.h>

enum {
	LEN = 1 << 20,
	MW_OPS = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_BIND_MW |
		 IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_SEND_WITH_INV,
	READ_WRITE = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE,
};

/* B's region grants nothing to the other side but what windows open. */
static struct end_cfg mw_cfg(void)
{
	return (struct end_cfg){ .len = LEN, .mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND };
}

static struct ibv_mw *window(struct end *b, enum ibv_mw_type type)
{
	struct ibv_mw *mw = ibv_alloc_mw(b->pd, type);

	CHECK(mw, "ibv_alloc_mw: %s", strerror(errno));
	EQ(mw->type, type);
	CHECK(mw->pd == b->pd && mw->context == ctx);
	return mw;
}

static struct ibv_mw_bind_info over(struct end *b, size_t off, size_t len, int access)
{
	return (struct ibv_mw_bind_info){ .mr = b->mr, .addr = (uintptr_t)b->buf + off, .length = len, .mw_access_flags = (unsigned)access };
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

static int post_bind(struct end *e, uint64_t wr_id, struct ibv_mw *mw, uint32_t rkey, struct ibv_mw_bind_info info)
{
	struct ibv_send_wr w = { .wr_id = wr_id, .opcode = IBV_WR_BIND_MW, .bind_mw = { mw, rkey, info } }, *bad;

	if (!e->qpx)
		return ibv_post_send(e->qp, &w, &bad);
	ibv_wr_start(e->qpx);
	e->qpx->wr_id = wr_id;
	e->qpx->wr_flags = 0;
	ibv_wr_bind_mw(e->qpx, mw, rkey, &info);
	return ibv_wr_complete(e->qpx);
}

static int post_local_inv(struct end *e, uint64_t wr_id, uint32_t rkey)
{
	struct ibv_send_wr w = { .wr_id = wr_id, .opcode = IBV_WR_LOCAL_INV, .invalidate_rkey = rkey }, *bad;

	if (!e->qpx)
		return ibv_post_send(e->qp, &w, &bad);
	ibv_wr_start(e->qpx);
	e->qpx->wr_id = wr_id;
	e->qpx->wr_flags = 0;
	ibv_wr_local_inv(e->qpx, rkey);
	return ibv_wr_complete(e->qpx);
}

static int post_send_inv(struct end *e, uint64_t wr_id, uint32_t rkey, size_t len)
{
	struct ibv_sge s = sge(e, 0, len);
	struct ibv_send_wr w = { .wr_id = wr_id, .opcode = IBV_WR_SEND_WITH_INV, .invalidate_rkey = rkey, .sg_list = &s, .num_sge = 1 }, *bad;

	if (!e->qpx)
		return ibv_post_send(e->qp, &w, &bad);
	ibv_wr_start(e->qpx);
	e->qpx->wr_id = wr_id;
	e->qpx->wr_flags = 0;
	ibv_wr_send_inv(e->qpx, rkey);
	ibv_wr_set_sge(e->qpx, s.lkey, s.addr, s.length);
	return ibv_wr_complete(e->qpx);
}

static int access_by(struct end *a, enum ibv_wr_opcode op, uint64_t wr_id, uint32_t rkey, uint64_t addr, size_t len)
{
	struct ibv_sge s = sge(a, 0, len);
	struct ibv_send_wr w = { .wr_id = wr_id, .sg_list = &s, .num_sge = 1, .opcode = op, .wr.rdma = { addr, rkey } };

	return post(a, &w, NULL);
}

static int write_to(struct end *a, uint64_t wr_id, uint32_t rkey, size_t off, size_t len)
{
	return access_by(a, IBV_WR_RDMA_WRITE, wr_id, rkey, a->peer.addr + off, len);
}

/* B binds a window of type 2 and waits for that; its key, in both processes. */
static uint32_t bound(struct pair *p, struct ibv_mw *mw, struct ibv_mw_bind_info info)
{
	uint32_t rkey = 0;

	if (p->b) {
		rkey = ibv_inc_rkey(mw->rkey);
		OK(post_bind(p->b, 100, mw, rkey, info));
		EQ(WANT(p->b->scq, 100, IBV_WC_SUCCESS).opcode, IBV_WC_BIND_MW);
	}
	return (uint32_t)from_b(rkey);
}

/* The same of type 1. */
static uint32_t bound_by_verb(struct pair *p, struct ibv_mw *mw, struct ibv_mw_bind_info info)
{
	if (p->b) {
		uint32_t before = mw->rkey;
		struct ibv_mw_bind bind = { .wr_id = 101, .send_flags = IBV_SEND_SIGNALED, .bind_info = info };

		OK(ibv_bind_mw(p->b->qp, mw, &bind));
		CHECK(mw->rkey != before && mw->rkey >> 8 == before >> 8, "a new key of the same window, got %#x after %#x", mw->rkey, before);
		EQ(WANT(p->b->scq, 101, IBV_WC_SUCCESS).opcode, IBV_WC_BIND_MW);
	}
	return (uint32_t)from_b(p->b ? mw->rkey : 0);
}

/* A's WRITE of 64 bytes is refused, and nothing landed. */
static void refused(struct pair *p, uint32_t rkey, size_t off)
{
	if (p->b)
		reset_buf(p->b);
	sync_ends();
	if (p->a) {
		fill(p->a->buf, 64, 77);
		OK(write_to(p->a, 7, rkey, off, 64));
		WANT(p->a->scq, 7, IBV_WC_REM_ACCESS_ERR);
		EQ(qp_state(p->a->qp), IBV_QPS_ERR);
	}
	sync_ends();
	if (p->b)
		ALL(p->b->buf, p->b->len, GUARD);
	sync_ends();
}

/* A's WRITE of 64 bytes arrives. */
static void taken(struct pair *p, uint32_t rkey, size_t off)
{
	if (p->b)
		reset_buf(p->b);
	sync_ends();
	if (p->a) {
		fill(p->a->buf, 64, 78);
		OK(write_to(p->a, 6, rkey, off, 64));
		WANT(p->a->scq, 6, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p->b) {
		SAME(p->b->buf + off, 64, 78);
		ALL(p->b->buf + off + 64, 64, GUARD);
	}
	sync_ends();
}

static void dealloc(struct ibv_mw *mw)
{
	if (mw)
		OK(ibv_dealloc_mw(mw));
}

/* ---- type 1 ------------------------------------------------------------------------------------------------------ */

static void type1_opens_its_part_alone(void)
{
	static const size_t outside[] = { 4096 - 1, 8192 - 63 };
	struct end_cfg c = mw_cfg();

	for (size_t i = 0; i < COUNT(outside); i++) {
		struct pair p = pair_open(&c, &c);
		struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_1) : NULL;
		uint32_t rkey = bound_by_verb(&p, mw, p.b ? over(p.b, 4096, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

		taken(&p, rkey, 4096);
		taken(&p, rkey, 8192 - 64);
		refused(&p, rkey, outside[i]);
		dealloc(mw);
	}
}

static void type1_bound_anew_has_a_new_key(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c), other = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_1) : NULL;
	uint32_t first = bound_by_verb(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, first, 0);
	uint32_t second = bound_by_verb(&p, mw, p.b ? over(p.b, 8192, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });
	taken(&p, second, 8192);
	refused(&p, first, 0);
	dealloc(mw);
	sync_ends();
	(void)other;
}

/* ibv_bind_mw(3): a length of 0 unbinds. */
static void type1_of_no_length_is_over(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_1) : NULL;
	uint32_t rkey = bound_by_verb(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, rkey, 0);
	bound_by_verb(&p, mw, p.b ? over(p.b, 0, 0, 0) : (struct ibv_mw_bind_info){ 0 });
	refused(&p, rkey, 0);
	dealloc(mw);
}

/* Every queue pair of the PD may use it. */
static void type1_is_the_pds(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct end_cfg same_pd = c;
	same_pd.pd = p.b ? p.b->pd : NULL;
	struct pair q = pair_open(&c, &same_pd);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_1) : NULL;
	uint32_t rkey = bound_by_verb(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, rkey, 0);
	if (q.a) {
		OK(access_by(q.a, IBV_WR_RDMA_READ, 5, rkey, p.a->peer.addr, 64));
		WANT(q.a->scq, 5, IBV_WC_SUCCESS);
		SAME(q.a->buf, 64, 78);
	}
	sync_ends();
	dealloc(mw);
}

/* ---- type 2 ------------------------------------------------------------------------------------------------------ */

static void type2_by(uint64_t ops)
{
	struct end_cfg c = mw_cfg();
	c.send_ops = ops;
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, LEN, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, rkey, 0);
	if (p.a) { /* longer than one copy */
		fill(p.a->buf, LEN, 4);
		OK(write_to(p.a, 8, rkey, 0, LEN));
		WANT(p.a->scq, 8, IBV_WC_SUCCESS);
		memset(p.a->buf, 0, LEN);
		OK(access_by(p.a, IBV_WR_RDMA_READ, 9, rkey, p.a->peer.addr, LEN));
		WANT(p.a->scq, 9, IBV_WC_SUCCESS);
		SAME(p.a->buf, LEN, 4);
	}
	sync_ends();
	if (p.b) {
		OK(post_local_inv(p.b, 10, rkey));
		EQ(WANT(p.b->scq, 10, IBV_WC_SUCCESS).opcode, IBV_WC_LOCAL_INV);
	}
	sync_ends();
	refused(&p, rkey, 0);
	dealloc(mw);
}

static void type2_post(void) { type2_by(0); }
static void type2_wr(void) { type2_by(MW_OPS); }

static void type2_is_one_queue_pairs(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct end_cfg same_pd = c;
	same_pd.pd = p.b ? p.b->pd : NULL;
	struct pair q = pair_open(&c, &same_pd);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, rkey, 0);
	if (q.a) {
		OK(access_by(q.a, IBV_WR_RDMA_WRITE, 5, rkey, p.a->peer.addr, 64));
		WANT(q.a->scq, 5, IBV_WC_REM_ACCESS_ERR);
	}
	taken(&p, rkey, 64);
	dealloc(mw);
}

static void remote_invalidation_by(uint64_t ops, size_t len)
{
	struct end_cfg c = mw_cfg();
	c.send_ops = ops;
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	taken(&p, rkey, 0);
	if (p.b)
		OK(post_receive(p.b, 1, 8192, LEN - 8192));
	sync_ends();
	if (p.a) {
		fill(p.a->buf, len, 5);
		OK(post_send_inv(p.a, 2, rkey, len));
		EQ(WANT(p.a->scq, 2, IBV_WC_SUCCESS).opcode, IBV_WC_SEND);
	}
	if (p.b) {
		struct ibv_wc wc = WANT(p.b->rcq, 1, IBV_WC_SUCCESS);

		EQ(wc.opcode, IBV_WC_RECV);
		EQ(wc.wc_flags & (IBV_WC_WITH_INV | IBV_WC_WITH_IMM), IBV_WC_WITH_INV);
		EQ(wc.invalidated_rkey, rkey);
		EQ(wc.byte_len, len);
		SAME(p.b->buf + 8192, len, 5);
	}
	sync_ends();
	refused(&p, rkey, 0);
	dealloc(mw);
}

static void remote_invalidation_post(void) { remote_invalidation_by(0, 20); }
static void remote_invalidation_wr(void) { remote_invalidation_by(MW_OPS, 300000); }

/* Who invalidated it finds it invalid at once, whether the other side has taken the message or not. */
static void remote_invalidation_is_in_order(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

	if (p.b)
		OK(post_receive(p.b, 1, 8192, 100));
	sync_ends();
	if (p.a) {
		OK(post_send_inv(p.a, 2, rkey, 20));
		OK(write_to(p.a, 3, rkey, 0, 64));
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
		WANT(p.a->scq, 3, IBV_WC_REM_ACCESS_ERR);
	}
	sync_ends();
	if (p.b) {
		WANT(p.b->rcq, 1, IBV_WC_SUCCESS);
		ALL(p.b->buf, 4096, GUARD);
	}
	sync_ends();
	dealloc(mw);
}

static void a_key_may_be_used_again(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;

	for (uint64_t round = 0; round < 5; round++) {
		uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

		taken(&p, rkey, 0);
		if (p.b)
			OK(post_receive(p.b, round, 8192, 100));
		sync_ends();
		if (p.a) {
			OK(post_send_inv(p.a, round, rkey, 20));
			WANT(p.a->scq, round, IBV_WC_SUCCESS);
		}
		if (p.b)
			EQ(WANT(p.b->rcq, round, IBV_WC_SUCCESS).invalidated_rkey, rkey);
		sync_ends();
	}
	dealloc(mw);
}

/* A message that names no window of this connection is an access error, and takes no receive. */
static void what_cannot_be_invalidated(void)
{
	struct end_cfg c = mw_cfg();

	for (int what = 0; what < 3; what++) {
		struct pair p = pair_open(&c, &c);
		struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_1) : NULL;
		uint32_t rkey = bound_by_verb(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });

		rkey = what == 0 ? rkey : what == 1 ? (uint32_t)from_b(p.b ? p.b->mr->rkey : 0) : 0xdeadbeef;
		if (p.b)
			OK(post_receive(p.b, 1, 8192, 100));
		sync_ends();
		if (p.a) {
			OK(post_send_inv(p.a, 2, rkey, 20));
			WANT(p.a->scq, 2, IBV_WC_REM_ACCESS_ERR);
		}
		if (p.b)
			WANT(p.b->rcq, 1, IBV_WC_WR_FLUSH_ERR);
		sync_ends();
		dealloc(mw);
	}
}

static void zero_based(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 4096, 4096, READ_WRITE | IBV_ACCESS_ZERO_BASED) : (struct ibv_mw_bind_info){ 0 });

	if (p.a) {
		fill(p.a->buf, 64, 6);
		OK(access_by(p.a, IBV_WR_RDMA_WRITE, 1, rkey, 100, 64));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		SAME(p.b->buf + 4196, 64, 6);
	sync_ends();
	refused(&p, rkey, 4096); /* the address itself is none of its */
	dealloc(mw);
}

static void the_windows_rights_hold(void)
{
	struct end_cfg c = mw_cfg();
	c.mr_access = ALL_ACCESS | IBV_ACCESS_MW_BIND; /* those of the region do not */
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, IBV_ACCESS_REMOTE_READ) : (struct ibv_mw_bind_info){ 0 });

	if (p.a) {
		OK(access_by(p.a, IBV_WR_RDMA_READ, 1, rkey, p.a->peer.addr, 64));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	refused(&p, rkey, 0);
	dealloc(mw);
}

static void atomics_by_a_window(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
	uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, 4096, IBV_ACCESS_REMOTE_ATOMIC) : (struct ibv_mw_bind_info){ 0 });
	size_t at = 64; /* buf is 64-byte aligned */

	if (p.b)
		memcpy(p.b->buf + at, &(uint64_t){ 40 }, 8);
	sync_ends();
	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 8);
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_ATOMIC_FETCH_AND_ADD,
					 .wr.atomic = { .remote_addr = p.a->peer.addr + at, .compare_add = 2, .rkey = rkey } };
		uint64_t old;

		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		memcpy(&old, p.a->buf, 8);
		EQ(old, 40);
	}
	sync_ends();
	if (p.b) {
		uint64_t value;

		memcpy(&value, p.b->buf + at, 8);
		EQ(value, 42);
	}
	sync_ends();
	dealloc(mw);
}

/* A window's key is no lkey. */
static void no_lkey(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_loopback(&c, &c);

	end_connect(p.a);
	end_connect(p.b);
	struct ibv_mw *mw = window(p.a, IBV_MW_TYPE_1);
	struct ibv_mw_bind bind = { .wr_id = 1, .bind_info = over(p.a, 0, 4096, READ_WRITE) };
	OK(ibv_bind_mw(p.a->qp, mw, &bind));
	WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	struct ibv_sge s = { .addr = (uintptr_t)p.a->buf, .length = 64, .lkey = mw->rkey };
	struct ibv_send_wr w = { .wr_id = 2, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };
	OK(post(p.a, &w, NULL));
	WANT(p.a->scq, 2, IBV_WC_LOC_PROT_ERR);
	OK(ibv_dealloc_mw(mw));
}

/* ---- what cannot be bound ---------------------------------------------------------------------------------------- */

/* The bind completes in error and takes the queue pair with it (IB spec vol. 1, 10.6.7.2: memory window bind error). */
static void bind_fails(struct end *e, struct ibv_mw *mw, struct ibv_mw_bind_info info)
{
	OK(post_bind(e, 3, mw, ibv_inc_rkey(mw->rkey), info));
	WANT(e->scq, 3, IBV_WC_MW_BIND_ERR);
	EQ(qp_state(e->qp), IBV_QPS_ERR);
}

static void binds_that_fail(void)
{
	static const int region[] = { ALL_ACCESS, IBV_ACCESS_MW_BIND, ALL_ACCESS | IBV_ACCESS_MW_BIND, ALL_ACCESS | IBV_ACCESS_MW_BIND };

	for (size_t i = 0; i < COUNT(region); i++) {
		struct end_cfg c = mw_cfg();
		c.mr_access = region[i];
		struct pair p = pair_open(&c, &c);
		if (p.b) {
			struct ibv_mw *mw = window(p.b, IBV_MW_TYPE_2);
			struct ibv_mw_bind_info info = over(p.b, i == 2 ? LEN - 100 : 0, 101, READ_WRITE);

			if (i == 3) { /* bound already */
				OK(post_bind(p.b, 1, mw, mw->rkey, info));
				WANT(p.b->scq, 1, IBV_WC_SUCCESS);
			}
			bind_fails(p.b, mw, info);
			OK(ibv_dealloc_mw(mw));
		}
		sync_ends();
	}
}

static void invalidating_what_is_not_bound(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b) {
		struct ibv_mw *mw = window(p.b, IBV_MW_TYPE_2);

		OK(post_local_inv(p.b, 3, mw->rkey));
		WANT(p.b->scq, 3, IBV_WC_MW_BIND_ERR);
		OK(ibv_dealloc_mw(mw));
	}
	sync_ends();
}

static void arguments(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_loopback(&c, &c);
	struct end_cfg ud = { .type = IBV_QPT_UD };
	struct pair q = pair_loopback(&ud, &ud);

	end_connect(p.a);
	end_connect(p.b);
	end_connect(q.a);
	NOT_MADE(ibv_alloc_mw(p.a->pd, 3), EINVAL);
	struct ibv_mw *one = window(p.a, IBV_MW_TYPE_1), *two = window(p.a, IBV_MW_TYPE_2);
	struct ibv_mw_bind bind = { .bind_info = over(p.a, 0, 64, READ_WRITE) };
	RC(ibv_bind_mw(p.a->qp, two, &bind), EINVAL);
	RC(post_bind(p.a, 1, one, one->rkey, bind.bind_info), EINVAL);
	RC(post_bind(p.a, 1, two, two->rkey, over(p.b, 0, 64, READ_WRITE)), EPERM);
	RC(post_bind(q.a, 1, two, two->rkey, bind.bind_info), EINVAL);
	bind.bind_info.mr = NULL;
	RC(ibv_bind_mw(p.a->qp, one, &bind), EINVAL);
	RC(ibv_dealloc_pd(p.a->pd), EBUSY);
	OK(ibv_dealloc_mw(one));
	OK(ibv_dealloc_mw(two));
}

static void a_bound_region_is_busy(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_loopback(&c, &c);

	end_connect(p.a);
	end_connect(p.b);
	struct ibv_mw *mw = window(p.a, IBV_MW_TYPE_2);
	OK(post_bind(p.a, 1, mw, mw->rkey, over(p.a, 0, 64, READ_WRITE)));
	WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	RC(ibv_dereg_mr(p.a->mr), EBUSY);
	CHECK(ibv_rereg_mr(p.a->mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_LOCAL_WRITE) != 0 && errno == EBUSY);
	OK(ibv_dealloc_mw(mw));
	OK(ibv_dereg_mr(p.a->mr));
	p.a->mr = NULL;
}

/* A window that is one queue pair's ends with it. */
static void a_reset_frees_the_window(void)
{
	struct end_cfg c = mw_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;

	bound(&p, mw, p.b ? over(p.b, 0, 4096, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });
	if (p.b) {
		OK(qp_set_state(p.b->qp, IBV_QPS_RESET));
		OK(ibv_dereg_mr(p.b->mr));
		p.b->mr = NULL;
	}
	sync_ends();
	dealloc(mw);
}

/* ---- revocation -------------------------------------------------------------------------------------------------- */

/*
 * A writes without a pause.  Once B's invalidation is complete not a byte changes any more, however much A had under way,
 * and A is told.
 */
static void nothing_lands_after_invalidation(void)
{
	struct end_cfg c = mw_cfg();
	c.cqe = 64;

	for (int round = 0; round < 10; round++) {
		struct pair p = pair_open(&c, &c);
		struct ibv_mw *mw = p.b ? window(p.b, IBV_MW_TYPE_2) : NULL;
		uint32_t rkey = bound(&p, mw, p.b ? over(p.b, 0, LEN, READ_WRITE) : (struct ibv_mw_bind_info){ 0 });
		enum ibv_wc_status last = IBV_WC_SUCCESS;

		if (!MULTI_PROCESS) {
			OK(write_to(p.a, 1, rkey, 0, LEN));
			OK(post_local_inv(p.b, 10, rkey));
			WANT(p.b->scq, 10, IBV_WC_SUCCESS);
		} else if (p.b) {
			uint8_t *seen = malloc(LEN);

			while (__atomic_load_n(p.b->buf + LEN - 1, __ATOMIC_RELAXED) == GUARD)
				;
			nanosleep(&(struct timespec){ .tv_nsec = 100000 * round }, NULL);
			OK(post_local_inv(p.b, 10, rkey));
			WANT(p.b->scq, 10, IBV_WC_SUCCESS);
			memcpy(seen, p.b->buf, LEN);
			be_late();
			CHECK(!memcmp(seen, p.b->buf, LEN), "bytes that came after the invalidation, round %d", round);
			free(seen);
		}
		for (uint64_t i = 2; p.a && last == IBV_WC_SUCCESS; i++) {
			fill(p.a->buf, LEN, i);
			OK(write_to(p.a, i, rkey, 0, LEN));
			last = WAIT(p.a->scq).status;
		}
		if (p.a)
			CHECK(last == IBV_WC_REM_ACCESS_ERR, "got '%s'", ibv_wc_status_str(last));
		sync_ends();
		dealloc(mw);
	}
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(type1_opens_its_part_alone), CASE(type1_bound_anew_has_a_new_key), CASE(type1_of_no_length_is_over), CASE(type1_is_the_pds),
	{ "type2/post", type2_post, 0 },
	{ "type2/wr", type2_wr, 0 },
	CASE(type2_is_one_queue_pairs),
	{ "remote_invalidation/post", remote_invalidation_post, 0 },
	{ "remote_invalidation/wr", remote_invalidation_wr, 0 },
	CASE(remote_invalidation_is_in_order), CASE(a_key_may_be_used_again), CASE(what_cannot_be_invalidated), CASE(zero_based),
	CASE(the_windows_rights_hold), CASE(atomics_by_a_window), { "no_lkey", no_lkey, LOCAL }, CASE(binds_that_fail),
	CASE(invalidating_what_is_not_bound), { "arguments", arguments, LOCAL }, { "a_bound_region_is_busy", a_bound_region_is_busy, LOCAL },
	CASE(a_reset_frees_the_window), CASE(nothing_lands_after_invalidation),
};
SUITE(cases)
