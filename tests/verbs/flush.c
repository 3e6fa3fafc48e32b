/* FLUSH (IBA annex A19): it completes when what was written before it is visible, and wants a right of its own. */
#include "common.h"

#include <sys/mman.h>

enum {
	LEN = 4 << 20,
	OPS = IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_SEND | QP_EX_WITH_FLUSH,
	ACCESS = ALL_ACCESS | ACCESS_FLUSH_GLOBAL,
};
static const uint64_t DEVICE_FLUSH_GLOBAL = 1ull << 38, DEVICE_FLUSH_PERSISTENT = 1ull << 39;

static uint64_t device_caps(void)
{
	struct ibv_device_attr_ex attr;

	OK(ibv_query_device_ex(ctx, NULL, &attr));
	return attr.device_cap_flags_ex;
}

static struct end_cfg flush_cfg(void)
{
	if (!(device_caps() & DEVICE_FLUSH_GLOBAL))
		skip_case("a device without FLUSH");
	return (struct end_cfg){ .len = LEN, .send_ops = OPS, .mr_access = ACCESS, .qp_access = ACCESS };
}

/* ---- requests ---------------------------------------------------------------------------------------------------- */

static void add_flush(struct end *a, uint64_t wr_id, uint32_t rkey, uint64_t addr, size_t len, int placement, int level)
{
	a->qpx->wr_id = wr_id;
	a->qpx->wr_flags = IBV_SEND_SIGNALED;
	wr_flush(a->qpx, rkey, addr, len, (uint8_t)placement, (uint8_t)level);
}

static int post_flush(struct end *a, uint64_t wr_id, uint32_t rkey, uint64_t addr, size_t len, int placement, int level)
{
	ibv_wr_start(a->qpx);
	add_flush(a, wr_id, rkey, addr, len, placement, level);
	return ibv_wr_complete(a->qpx);
}

/* The first `len` bytes of the other side's region. */
static int flush_range(struct end *a, uint64_t wr_id, size_t len)
{
	return post_flush(a, wr_id, a->peer.rkey, a->peer.addr, len, FLUSH_GLOBAL, FLUSH_RANGE);
}

/* ---- what it is for ---------------------------------------------------------------------------------------------- */

/* WRITEs that say nothing themselves, and a FLUSH behind them. */
static void writes_are_there_when_it_completes(void)
{
	static const size_t lens[] = { 1, 8, 4096, 4097, 300000, LEN };
	struct end_cfg c = flush_cfg();
	c.unsignalled = 1;
	struct pair p = pair_open(&c, &c);

	for (size_t i = 0; i < COUNT(lens); i++) {
		if (p.b)
			reset_buf(p.b);
		sync_ends();
		if (p.a) {
			fill(p.a->buf, lens[i], i);
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, lens[i], 0, 0));
			OK(flush_range(p.a, 2, lens[i]));
			EQ(WANT(p.a->scq, 2, IBV_WC_SUCCESS).opcode, WC_FLUSH);
			EMPTY(p.a->scq);
		}
		sync_ends();
		if (p.b) {
			SAME(p.b->buf, lens[i], i);
			ALL(p.b->buf + lens[i], LEN - lens[i], GUARD);
			MARGINS(p.b);
		}
		sync_ends();
	}
}

/* Of a whole region neither address nor length count. */
static void a_whole_region(void)
{
	struct end_cfg c = flush_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		fill(p.a->buf, 64, 1);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 64, 128, 0));
		OK(post_flush(p.a, 2, p.a->peer.rkey, 0, 0, FLUSH_GLOBAL, FLUSH_MR));
		OK(post_flush(p.a, 3, p.a->peer.rkey, p.a->peer.addr + LEN, SIZE_MAX, FLUSH_GLOBAL, FLUSH_MR));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
		WANT(p.a->scq, 3, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		SAME(p.b->buf + 128, 64, 1);
}

/* Between other requests, more of them than READs may be under way, and all complete in their order. */
static void many_in_their_order(void)
{
	enum { ROUNDS = 10 };
	struct end_cfg c = flush_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		struct ibv_sge from = sge(p.a, 0, 64), to = sge(p.a, 4096, 64);

		fill(p.a->buf, 64, 9);
		ibv_wr_start(p.a->qpx);
		for (uint64_t i = 0; i < ROUNDS; i++) {
			p.a->qpx->wr_id = 10 * i;
			p.a->qpx->wr_flags = 0;
			ibv_wr_rdma_write(p.a->qpx, p.a->peer.rkey, p.a->peer.addr);
			ibv_wr_set_sge(p.a->qpx, from.lkey, from.addr, from.length);
			for (uint64_t k = 1; k < 4; k++)
				add_flush(p.a, 10 * i + k, p.a->peer.rkey, p.a->peer.addr, 64, FLUSH_GLOBAL, FLUSH_RANGE);
			p.a->qpx->wr_id = 10 * i + 4;
			p.a->qpx->wr_flags = i % 2 ? IBV_SEND_FENCE : 0;
			ibv_wr_rdma_read(p.a->qpx, p.a->peer.rkey, p.a->peer.addr);
			ibv_wr_set_sge(p.a->qpx, to.lkey, to.addr, to.length);
		}
		OK(ibv_wr_complete(p.a->qpx));
		for (uint64_t i = 0; i < ROUNDS; i++)
			for (uint64_t k = 0; k < 5; k++)
				EQ(WANT(p.a->scq, 10 * i + k, IBV_WC_SUCCESS).opcode,
				   k == 0 ? IBV_WC_RDMA_WRITE : k == 4 ? IBV_WC_RDMA_READ : WC_FLUSH);
		SAME(p.a->buf + 4096, 64, 9);
	}
	sync_ends();
}

/* Pages that stay where they are: the other mapping of the file shows what was written. */
static void memory_that_cannot_move(void)
{
	enum { SIZE = 1 << 16 };
	struct end_cfg c = flush_cfg();
	struct pair p = pair_open(&c, &c);
	int fd = memfd_create("flush", 0);
	uint8_t *registered, *other;
	struct ibv_mr *mr = NULL;

	EQ(ftruncate(fd, SIZE), 0);
	registered = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	other = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(registered != MAP_FAILED && other != MAP_FAILED);
	if (p.b)
		mr = MADE(ibv_reg_mr(p.b->pd, registered, SIZE, ACCESS & ~IBV_ACCESS_REMOTE_ATOMIC));
	uint32_t rkey = (uint32_t)from_b(mr ? mr->rkey : 0);
	uint64_t addr = from_b((uintptr_t)registered);
	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, SIZE);
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE, .wr.rdma = { addr, rkey } };

		fill(p.a->buf, SIZE, 3);
		OK(post(p.a, &w, NULL));
		OK(post_flush(p.a, 2, rkey, addr, SIZE, FLUSH_GLOBAL, FLUSH_RANGE));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b) {
		SAME(other, SIZE, 3);
		OK(ibv_dereg_mr(mr));
	}
	EQ(munmap(registered, SIZE), 0);
	EQ(munmap(other, SIZE), 0);
	EQ(close(fd), 0);
}

/* Setters of data are allowed, and nothing of it moves. */
static void it_carries_no_data(void)
{
	struct end_cfg c = flush_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		fill(p.a->buf, 4096, 1);
		ibv_wr_start(p.a->qpx);
		add_flush(p.a, 1, p.a->peer.rkey, p.a->peer.addr, 64, FLUSH_GLOBAL, FLUSH_RANGE);
		ibv_wr_set_sge(p.a->qpx, p.a->mr->lkey, (uintptr_t)p.a->buf, 4096);
		add_flush(p.a, 2, p.a->peer.rkey, p.a->peer.addr, 64, FLUSH_GLOBAL, FLUSH_RANGE);
		ibv_wr_set_sge(p.a->qpx, p.a->mr->lkey, (uintptr_t)p.a->buf, 16);
		OK(ibv_wr_complete(p.a->qpx));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		ALL(p.b->buf, LEN, GUARD);
}

/* ---- what it is refused for -------------------------------------------------------------------------------------- */

struct trial {
	int mr_access, qp_access; /* B's; 0 stands for all */
	int placement, level;	  /* placement 0 stands for global */
	uint32_t rkey_xor;
	int64_t off; /* from the region's start */
	size_t len;
	enum ibv_wc_status status;
};

/* One FLUSH, with a WRITE before it that B's region may take, and a request behind it. */
static void run_trial(const struct trial *t)
{
	struct end_cfg a = flush_cfg(), b = a;
	b.mr_access = t->mr_access ? t->mr_access : ACCESS;
	b.qp_access = t->qp_access ? t->qp_access : ACCESS;
	a.len = b.len = 8192;
	struct pair p = pair_open(&a, &b);

	if (p.a) {
		uint64_t addr = p.a->peer.addr + (uint64_t)t->off;
		int placement = t->placement ? t->placement : FLUSH_GLOBAL;

		OK(post_flush(p.a, 1, p.a->peer.rkey ^ t->rkey_xor, addr, t->len, placement, t->level));
		WANT(p.a->scq, 1, t->status);
		EQ(qp_state(p.a->qp), t->status ? IBV_QPS_ERR : IBV_QPS_RTS);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 0, 0, 0));
		WANT(p.a->scq, 2, t->status ? IBV_WC_WR_FLUSH_ERR : IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		ALL(p.b->buf, p.b->len, GUARD);
	sync_ends();
	if (p.a)
		end_destroy(p.a);
	if (p.b)
		end_destroy(p.b);
}

#define TRIAL(...) run_trial(&(struct trial){ __VA_ARGS__ })

/* The range lies in the region, and the key is one, whatever the length. */
static void ranges(void)
{
	enum ibv_wc_status no = IBV_WC_REM_ACCESS_ERR;

	TRIAL(.off = 8191, .len = 1);
	TRIAL(.len = 8192);
	TRIAL(.off = 8192, .len = 0);
	TRIAL(.off = 8192, .len = 1, .status = no);
	TRIAL(.off = 0, .len = 8193, .status = no);
	TRIAL(.off = -1, .len = 8, .status = no);
	TRIAL(.off = 8193, .len = 0, .status = no);
	TRIAL(.off = 64, .len = SIZE_MAX - 32, .status = no);
	TRIAL(.len = 64, .rkey_xor = 1 << 16, .status = no);
	TRIAL(.len = 0, .rkey_xor = 1 << 16, .status = no);
	TRIAL(.level = FLUSH_MR, .rkey_xor = 1 << 16, .status = no);
}

/* The region and the queue pair grant the placement; the right to write is another one. */
static void rights(void)
{
	enum { BOTH = ACCESS_FLUSH_GLOBAL | ACCESS_FLUSH_PERSISTENT };
	enum ibv_wc_status region = IBV_WC_REM_ACCESS_ERR, queue_pair = IBV_WC_REM_INV_REQ_ERR;

	TRIAL(.len = 8, .mr_access = ACCESS_FLUSH_GLOBAL);
	TRIAL(.len = 8, .qp_access = ACCESS_FLUSH_GLOBAL);
	TRIAL(.len = 8, .mr_access = ALL_ACCESS, .status = region);
	TRIAL(.level = FLUSH_MR, .mr_access = ALL_ACCESS, .status = region);
	TRIAL(.len = 8, .qp_access = ALL_ACCESS, .status = queue_pair);
	TRIAL(.level = FLUSH_MR, .qp_access = ALL_ACCESS, .status = queue_pair);
	/* No memory here is persistent: a queue pair may say it would serve that, but no region. */
	TRIAL(.len = 8, .placement = FLUSH_PERSISTENT, .status = queue_pair);
	TRIAL(.len = 8, .placement = FLUSH_PERSISTENT, .qp_access = BOTH, .status = region);
	TRIAL(.len = 8, .placement = FLUSH_PERSISTENT | FLUSH_GLOBAL, .qp_access = BOTH, .status = region);
}

/* A window grants it as it grants other rights, for its own part. */
static void by_a_window(void)
{
	static const struct {
		int access;
		size_t off;
		int level;
		enum ibv_wc_status status;
	} trials[] = {
		{ ACCESS_FLUSH_GLOBAL | IBV_ACCESS_REMOTE_WRITE, 4096, FLUSH_RANGE, IBV_WC_SUCCESS },
		{ ACCESS_FLUSH_GLOBAL, 4096, FLUSH_MR, IBV_WC_SUCCESS },
		{ ACCESS_FLUSH_GLOBAL, 4095, FLUSH_RANGE, IBV_WC_REM_ACCESS_ERR },
		{ IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, 4096, FLUSH_RANGE, IBV_WC_REM_ACCESS_ERR },
		{ IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, 4096, FLUSH_MR, IBV_WC_REM_ACCESS_ERR },
	};
	struct end_cfg c = flush_cfg();
	c.len = 1 << 16;
	c.mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND;

	for (size_t i = 0; i < COUNT(trials); i++) {
		struct pair p = pair_open(&c, &c);
		struct ibv_mw *mw = p.b ? MADE(ibv_alloc_mw(p.b->pd, IBV_MW_TYPE_1)) : NULL;

		if (p.b) {
			struct ibv_mw_bind bind = { .wr_id = 7, .send_flags = IBV_SEND_SIGNALED,
						    .bind_info = { .mr = p.b->mr, .addr = (uintptr_t)p.b->buf + 4096, .length = 4096,
								   .mw_access_flags = (unsigned)trials[i].access } };

			OK(ibv_bind_mw(p.b->qp, mw, &bind));
			WANT(p.b->scq, 7, IBV_WC_SUCCESS);
		}
		uint32_t rkey = (uint32_t)from_b(mw ? mw->rkey : 0);
		if (p.a) {
			OK(post_flush(p.a, 1, rkey, p.a->peer.addr + trials[i].off, 4096, FLUSH_GLOBAL, trials[i].level));
			WANT(p.a->scq, 1, trials[i].status);
		}
		sync_ends();
		if (mw)
			OK(ibv_dealloc_mw(mw));
	}
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

static int only_flush(struct end *e, int placement, int level)
{
	return post_flush(e, 1, e->peer.rkey, e->peer.addr, 8, placement, level);
}

static void arguments(void)
{
	struct end_cfg c = flush_cfg(), without = c;
	without.send_ops = IBV_QP_EX_WITH_RDMA_WRITE;
	struct pair p = pair_loopback(&c, &c), q = pair_loopback(&without, &c);
	struct ibv_send_wr w = { .opcode = (enum ibv_wr_opcode)WR_FLUSH }, *bad;

	end_connect(p.a);
	end_connect(p.b);
	end_connect(q.a);
	RC(only_flush(p.a, 0, FLUSH_RANGE), EINVAL);
	RC(only_flush(p.a, 4, FLUSH_RANGE), EINVAL);
	RC(only_flush(p.a, FLUSH_GLOBAL | 0x80, FLUSH_RANGE), EINVAL);
	RC(only_flush(p.a, FLUSH_GLOBAL, 2), EINVAL);
	RC(only_flush(q.a, FLUSH_GLOBAL, FLUSH_RANGE), EOPNOTSUPP);
	RC(ibv_post_send(p.a->qp, &w, &bad), EOPNOTSUPP); /* whose structure has no place for a range */
	CHECK(bad == &w, "bad_wr was not set");
	EMPTY(p.a->scq);
	OK(only_flush(p.a, FLUSH_GLOBAL, FLUSH_RANGE));
	WANT(p.a->scq, 1, IBV_WC_SUCCESS);
}

/* UC is not answered, and UD has sends only. */
static void other_types_refuse_it(void)
{
	static const enum ibv_qp_type types[] = { IBV_QPT_UC, IBV_QPT_UD };

	for (size_t i = 0; i < COUNT(types); i++) {
		struct end_cfg c = flush_cfg();
		c.type = types[i];
		struct pair p = pair_loopback(&c, &c);

		end_connect(p.a);
		end_connect(p.b);
		RC(only_flush(p.a, FLUSH_GLOBAL, FLUSH_RANGE), EINVAL);
		EMPTY(p.a->scq);
	}
}

/* Nothing here survives a loss of power: no region is persistent, and the device does not say that one could be. */
static void nothing_is_persistent(void)
{
	struct end_cfg c = flush_cfg();
	struct pair p = pair_loopback(&c, &c);
	struct ibv_mw *mw = MADE(ibv_alloc_mw(p.b->pd, IBV_MW_TYPE_1));
	struct ibv_mw_bind bind = { .bind_info = { .mr = p.b->mr, .addr = (uintptr_t)p.b->buf, .length = 64,
						   .mw_access_flags = ACCESS_FLUSH_PERSISTENT } };
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;

	EQ(device_caps() & DEVICE_FLUSH_PERSISTENT, 0);
	NOT_MADE(ibv_reg_mr(p.a->pd, p.a->buf, 64, ACCESS | ACCESS_FLUSH_PERSISTENT), EOPNOTSUPP);
	errno = 0;
	EQ(ibv_rereg_mr(p.a->mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, ACCESS_FLUSH_PERSISTENT), IBV_REREG_MR_ERR_INPUT);
	EQ(errno, EOPNOTSUPP);
	p.b->cfg.qp_access = ACCESS | ACCESS_FLUSH_PERSISTENT;
	end_connect(p.a);
	end_connect(p.b);
	RC(ibv_bind_mw(p.b->qp, mw, &bind), EOPNOTSUPP);
	OK(ibv_query_qp(p.b->qp, &attr, IBV_QP_ACCESS_FLAGS, &init));
	EQ(attr.qp_access_flags, (unsigned)p.b->cfg.qp_access);
	OK(ibv_dealloc_mw(mw));
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(writes_are_there_when_it_completes), CASE(a_whole_region), CASE(many_in_their_order), CASE(memory_that_cannot_move),
	CASE(it_carries_no_data), CASE(ranges), CASE(rights), CASE(by_a_window), { "arguments", arguments, LOCAL },
	{ "other_types_refuse_it", other_types_refuse_it, LOCAL }, { "nothing_is_persistent", nothing_is_persistent, LOCAL },
};
SUITE(cases)
