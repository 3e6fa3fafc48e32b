/* Ends and pairs: queue pairs with their buffer, brought to RTS against each other, and given back with every result checked. */
#include "common.h"
#include "internal.h"

#include <sys/mman.h>

enum { MAX_ENDS = 128 };
static struct end ends[MAX_ENDS];

static int or_default(int value, int fallback)
{
	return value == NONE ? 0 : value ? value : fallback;
}

static struct end_cfg with_defaults(const struct end_cfg *given)
{
	struct end_cfg c = given ? *given : (struct end_cfg){ 0 };

	c.type = c.type ? c.type : IBV_QPT_RC;
	c.send_wr = or_default(c.send_wr, 64);
	c.recv_wr = or_default(c.recv_wr, 64);
	c.send_sge = or_default(c.send_sge, 1);
	c.recv_sge = or_default(c.recv_sge, 1);
	c.cqe = or_default(c.cqe, 256);
	c.mr_access = or_default(c.mr_access, ALL_ACCESS);
	c.qp_access = or_default(c.qp_access, ALL_ACCESS);
	c.timeout = or_default(c.timeout, 16);
	c.retry_cnt = or_default(c.retry_cnt, 7);
	c.rnr_retry = or_default(c.rnr_retry, 7);
	c.min_rnr_timer = or_default(c.min_rnr_timer, 12);
	c.rd_atomic = or_default(c.rd_atomic, 1);
	c.len = c.len ? c.len : 4096;
	return c;
}

struct ibv_qp_init_attr qp_init_attr(const struct end_cfg *given, struct ibv_cq *scq, struct ibv_cq *rcq)
{
	struct end_cfg c = with_defaults(given);

	return (struct ibv_qp_init_attr){
		.send_cq = scq,
		.recv_cq = rcq,
		.srq = c.srq,
		.qp_type = c.type,
		.sq_sig_all = !c.unsignalled,
		.cap = { .max_send_wr = (uint32_t)c.send_wr,
			 .max_recv_wr = (uint32_t)c.recv_wr,
			 .max_send_sge = (uint32_t)c.send_sge,
			 .max_recv_sge = (uint32_t)c.recv_sge,
			 .max_inline_data = (uint32_t)or_default(c.inline_data, 0) },
	};
}

static void make_qp(struct end *e)
{
	struct ibv_qp_init_attr plain = qp_init_attr(&e->cfg, e->scq, e->rcq);

	if (!e->cfg.send_ops) {
		e->qp = MADE(ibv_create_qp(e->pd, &plain));
		return;
	}
	struct ibv_qp_init_attr_ex ex = {
		.send_cq = plain.send_cq, .recv_cq = plain.recv_cq, .srq = plain.srq, .cap = plain.cap, .qp_type = plain.qp_type,
		.sq_sig_all = plain.sq_sig_all, .pd = e->pd, .send_ops_flags = e->cfg.send_ops,
		.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
	};
	errno = 0;
	e->qp = ibv_create_qp_ex(ctx, &ex);
	if (!e->qp && errno == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from ibv_create_qp_ex");
	MADE(e->qp);
	e->qpx = MADE(ibv_qp_to_qp_ex(e->qp));
}

static struct end *end_create(const struct end_cfg *cfg)
{
	struct end *e = ends;

	while (e < ends + MAX_ENDS && e->used)
		e++;
	CHECK(e < ends + MAX_ENDS, "a free slot for an end");
	*e = (struct end){ .used = true, .cfg = with_defaults(cfg) };
	e->len = e->cfg.len;
	/* Pages of its own: neighbours of other PDs in one page are a case of their own, in objects.c. */
	e->raw = mmap(NULL, e->len + 2 * MARGIN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(e->raw != MAP_FAILED, "mmap of %zu: %s", e->len, strerror(errno));
	e->buf = e->raw + MARGIN;
	memset(e->raw, GUARD, e->len + 2 * MARGIN);
	e->pd = e->cfg.pd ? e->cfg.pd : MADE(ibv_alloc_pd(ctx));
	if (e->cfg.with_channel)
		e->channel = MADE(ibv_create_comp_channel(ctx));
	if (e->cfg.cq) {
		e->scq = e->rcq = e->cfg.cq;
	} else {
		e->scq = MADE(ibv_create_cq(ctx, e->cfg.cqe, e, e->channel, 0));
		e->rcq = e->cfg.one_cq ? e->scq : MADE(ibv_create_cq(ctx, e->cfg.cqe, e, e->channel, 0));
	}
	make_qp(e);
	/* A UD end is reached by sends alone. */
	int access = e->cfg.type == IBV_QPT_UD ? IBV_ACCESS_LOCAL_WRITE : e->cfg.mr_access;
	e->mr = MADE(ibv_reg_mr(e->pd, e->buf, e->len, access));
	uint64_t mix = seed ^ e->qp->qp_num;
	e->me = (struct end_info){ .qpn = e->qp->qp_num, .psn = (uint32_t)next_random(&mix) & 0xffffff, .rkey = e->mr->rkey,
				   .addr = (uintptr_t)e->buf, .len = e->len };
	memcpy(e->me.gid, &own_gid, 16);
	return e;
}

/* ---- connecting -------------------------------------------------------------------------------------------------- */

static struct ibv_ah_attr towards(const struct end *e)
{
	struct ibv_ah_attr ah = { .is_global = 1, .port_num = port_num, .grh = { .sgid_index = (uint8_t)gid_index, .hop_limit = 64 } };

	memcpy(&ah.grh.dgid, e->peer.gid, 16);
	return ah;
}

/* Attributes of a transition, which UD has none of. */
static int by_type(const struct end *e, int rc, int uc)
{
	return e->cfg.type == IBV_QPT_UD ? 0 : e->cfg.type == IBV_QPT_UC ? uc : rc;
}

int qp_init(struct end *e)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = port_num, .qp_access_flags = (unsigned)e->cfg.qp_access, .qkey = UD_QKEY };
	int mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;

	return ibv_modify_qp(e->qp, &a, mask | (e->cfg.type == IBV_QPT_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS));
}

int qp_rtr(struct end *e)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTR, .path_mtu = port_attr.active_mtu, .dest_qp_num = e->peer.qpn, .rq_psn = e->peer.psn,
				 .max_dest_rd_atomic = (uint8_t)e->cfg.rd_atomic, .min_rnr_timer = (uint8_t)e->cfg.min_rnr_timer,
				 .ah_attr = towards(e) };
	int uc = IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	int rc = uc | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;

	return ibv_modify_qp(e->qp, &a, IBV_QP_STATE | by_type(e, rc, uc));
}

int qp_rts(struct end *e)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTS, .sq_psn = e->me.psn, .timeout = (uint8_t)e->cfg.timeout,
				 .retry_cnt = (uint8_t)e->cfg.retry_cnt, .rnr_retry = (uint8_t)e->cfg.rnr_retry,
				 .max_rd_atomic = (uint8_t)e->cfg.rd_atomic };
	int rc = IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;

	return ibv_modify_qp(e->qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN | by_type(e, rc, 0));
}

void end_connect(struct end *e)
{
	OK(qp_init(e));
	OK(qp_rtr(e));
	OK(qp_rts(e));
	if (e->cfg.type == IBV_QPT_UD) {
		struct ibv_ah_attr ah = towards(e);

		e->ah = MADE(ibv_create_ah(e->pd, &ah));
	}
}

struct pair pair_create(const struct end_cfg *a, const struct end_cfg *b)
{
	struct pair p = { is_a ? end_create(a) : NULL, is_b ? end_create(b) : NULL };

	if (p.a && p.b) {
		p.a->peer = p.b->me;
		p.b->peer = p.a->me;
	} else {
		struct end *e = p.a ? p.a : p.b;

		swap_bytes(&e->me, &e->peer, sizeof(e->me));
	}
	return p;
}

struct pair pair_loopback(const struct end_cfg *a, const struct end_cfg *b)
{
	struct pair p = { end_create(a), end_create(b) };

	p.a->peer = p.b->me;
	p.b->peer = p.a->me;
	return p;
}

struct pair pair_open(const struct end_cfg *a, const struct end_cfg *b)
{
	struct pair p = pair_create(a, b);

	if (p.a)
		end_connect(p.a);
	if (p.b)
		end_connect(p.b);
	sync_ends();
	return p;
}

int qp_set_state(struct ibv_qp *qp, enum ibv_qp_state state)
{
	struct ibv_qp_attr a = { .qp_state = state };

	return ibv_modify_qp(qp, &a, IBV_QP_STATE);
}

enum ibv_qp_state qp_state(struct ibv_qp *qp)
{
	struct ibv_qp_attr a = { 0 };
	struct ibv_qp_init_attr init = { 0 };

	OK(ibv_query_qp(qp, &a, IBV_QP_STATE, &init));
	return a.qp_state;
}

/* ---- giving back ------------------------------------------------------------------------------------------------- */

void end_destroy_qp(struct end *e)
{
	if (e->ah)
		OK(ibv_destroy_ah(e->ah));
	e->ah = NULL;
	if (e->qp)
		OK(ibv_destroy_qp(e->qp));
	e->qp = NULL;
}

void end_destroy(struct end *e)
{
	end_destroy_qp(e);
	if (e->mr)
		OK(ibv_dereg_mr(e->mr));
	e->mr = NULL;
	if (!e->cfg.cq && e->rcq && e->rcq != e->scq)
		OK(ibv_destroy_cq(e->rcq));
	e->rcq = NULL;
	if (!e->cfg.cq && e->scq)
		OK(ibv_destroy_cq(e->scq));
	e->scq = NULL;
	if (e->channel)
		OK(ibv_destroy_comp_channel(e->channel));
	e->channel = NULL;
	if (e->pd && !e->cfg.pd)
		OK(ibv_dealloc_pd(e->pd));
	EQ(munmap(e->raw, e->len + 2 * MARGIN), 0);
	*e = (struct end){ 0 };
}

void ends_destroy_all(void)
{
	/* Youngest first: a later end may live in an earlier one's PD. */
	for (struct end *e = ends + MAX_ENDS; e-- > ends;)
		if (e->used) {
			e->used = false; /* if giving it back fails, it fails once */
			end_destroy(e);
		}
}

void margins_at(const char *file, int line, const struct end *e)
{
	all_at(file, line, e->raw, MARGIN, GUARD);
	all_at(file, line, e->buf + e->len, MARGIN, GUARD);
}

void reset_buf(struct end *e)
{
	memset(e->buf, GUARD, e->len);
}
