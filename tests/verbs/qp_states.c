/* The QP state machine: every transition of the specification's table with its masks, and nothing else (IBA 10.3.1, man ibv_modify_qp). */
#include "common.h"

/* ---- the table --------------------------------------------------------------------------------------------------- */

struct row {
	enum ibv_qp_state from, to;
	int required, optional;
};

/* ALT_PATH and PATH_MIG_STATE (automatic path migration) are optional for RC in the specification; they are left out. */
enum { PATH_MIGRATION = IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE };

static const struct row RC_ROWS[] = {
	{ IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, 0 },
	{ IBV_QPS_INIT, IBV_QPS_INIT, 0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS },
	{ IBV_QPS_INIT, IBV_QPS_RTR,
	  IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
	  IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX },
	{ IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
	  IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
	{ IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
	{ IBV_QPS_RTS, IBV_QPS_SQD, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY },
	{ IBV_QPS_SQD, IBV_QPS_SQD, 0,
	  IBV_QP_PORT | IBV_QP_AV | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC |
		  IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | IBV_QP_MIN_RNR_TIMER },
	{ IBV_QPS_SQD, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER },
};

static const struct row UD_ROWS[] = {
	{ IBV_QPS_RESET, IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY, 0 },
	{ IBV_QPS_INIT, IBV_QPS_INIT, 0, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY },
	{ IBV_QPS_INIT, IBV_QPS_RTR, 0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY },
	{ IBV_QPS_RTR, IBV_QPS_RTS, IBV_QP_SQ_PSN, IBV_QP_CUR_STATE | IBV_QP_QKEY },
	{ IBV_QPS_RTS, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY },
	{ IBV_QPS_RTS, IBV_QPS_SQD, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY },
	{ IBV_QPS_SQD, IBV_QPS_SQD, 0, IBV_QP_PKEY_INDEX | IBV_QP_QKEY },
	{ IBV_QPS_SQD, IBV_QPS_RTS, 0, IBV_QP_CUR_STATE | IBV_QP_QKEY },
};

struct machine {
	enum ibv_qp_type type;
	const struct row *rows;
	size_t count;
};
static const struct machine RC_QP = { IBV_QPT_RC, RC_ROWS, COUNT(RC_ROWS) }, UD_QP = { IBV_QPT_UD, UD_ROWS, COUNT(UD_ROWS) };
static const enum ibv_qp_state STATES[] = { IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD, IBV_QPS_ERR };
static const char *const NAMES[] = { "RESET", "INIT", "RTR", "RTS", "SQD", "SQE", "ERR" };

/* Every state goes to RESET and to ERR, with no attribute. */
static const struct row *find(const struct machine *m, enum ibv_qp_state from, enum ibv_qp_state to)
{
	static const struct row bare;

	if (to == IBV_QPS_RESET || to == IBV_QPS_ERR)
		return &bare;
	for (size_t i = 0; i < m->count; i++)
		if (m->rows[i].from == from && m->rows[i].to == to)
			return &m->rows[i];
	return NULL;
}

/* ---- driving one QP ---------------------------------------------------------------------------------------------- */

static struct ibv_qp_attr attributes(const struct end *e, enum ibv_qp_state from, enum ibv_qp_state to)
{
	struct ibv_qp_attr a = {
		.qp_state = to, .cur_qp_state = from, .path_mtu = IBV_MTU_1024, .qkey = UD_QKEY, .rq_psn = 0x123456, .sq_psn = 0x654321,
		.dest_qp_num = e->peer.qpn, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ, .port_num = port_num,
		.max_rd_atomic = 1, .max_dest_rd_atomic = 1, .min_rnr_timer = 13, .timeout = 15, .retry_cnt = 6, .rnr_retry = 5,
		.ah_attr = { .is_global = 1, .port_num = port_num, .sl = 3,
			     .grh = { .dgid = own_gid, .sgid_index = (uint8_t)gid_index, .hop_limit = 33, .traffic_class = 8, .flow_label = 0 } },
	};
	return a;
}

static int go(struct end *e, enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
	struct ibv_qp_attr a = attributes(e, from, to);

	return ibv_modify_qp(e->qp, &a, IBV_QP_STATE | mask);
}

static void drive(const struct machine *m, struct end *e, enum ibv_qp_state to)
{
	static const enum ibv_qp_state path[] = { IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS, IBV_QPS_SQD };
	size_t i = 0;

	OK(go(e, 0, IBV_QPS_RESET, 0));
	for (; path[i] != (to == IBV_QPS_ERR ? IBV_QPS_INIT : to); i++)
		OK(go(e, path[i], path[i + 1], find(m, path[i], path[i + 1])->required));
	if (to == IBV_QPS_ERR)
		OK(go(e, IBV_QPS_INIT, IBV_QPS_ERR, 0));
}

static void expect(struct end *e, enum ibv_qp_state from, enum ibv_qp_state to, int mask, int want)
{
	int rc = go(e, from, to, mask);
	enum ibv_qp_state now_in = want ? from : to, got = qp_state(e->qp);

	CHECK(rc == want, "%s -> %s with mask 0x%x gave %d", NAMES[from], NAMES[to], mask, rc);
	CHECK(got == now_in, "%s -> %s with mask 0x%x (%d) left it in %s", NAMES[from], NAMES[to], mask, rc, NAMES[got]);
	EQ(e->qp->state, now_in);
}

static struct end *fresh(const struct machine *m)
{
	struct end_cfg c = { .type = m->type };

	return pair_loopback(&c, &c).a;
}

/* ---- transitions ------------------------------------------------------------------------------------------------- */

static void all_transitions(const struct machine *m)
{
	struct end *e = fresh(m);

	for (size_t f = 0; f < COUNT(STATES); f++)
		for (size_t t = 0; t < COUNT(STATES); t++) {
			const struct row *row = find(m, STATES[f], STATES[t]);

			drive(m, e, STATES[f]);
			if (STATES[f] == IBV_QPS_RESET && STATES[t] == IBV_QPS_ERR && go(e, IBV_QPS_RESET, IBV_QPS_ERR, 0) == EINVAL)
				continue; /* IBA says any state, the kernel's table leaves RESET out: either will do */
			drive(m, e, STATES[f]);
			expect(e, STATES[f], STATES[t], row ? row->required : 0, row ? 0 : EINVAL);
			if (!row) /* nor with attributes that another transition to it wants */
				for (size_t i = 0; i < m->count; i++)
					if (m->rows[i].to == STATES[t])
						expect(e, STATES[f], STATES[t], m->rows[i].required, EINVAL);
		}
}

static void all_masks(const struct machine *m)
{
	struct end *e = fresh(m);

	for (size_t i = 0; i < m->count; i++) {
		const struct row *r = &m->rows[i];

		for (int bit = IBV_QP_CUR_STATE; bit <= IBV_QP_DEST_QPN; bit <<= 1) {
			if (bit & PATH_MIGRATION)
				continue;
			drive(m, e, r->from);
			if (bit & r->required)
				expect(e, r->from, r->to, r->required & ~bit, EINVAL);
			else
				expect(e, r->from, r->to, r->required | bit, bit & r->optional ? 0 : EINVAL);
		}
		drive(m, e, r->from);
		expect(e, r->from, r->to, r->required | (r->optional & ~IBV_QP_CUR_STATE), 0);
	}
}

static void rc_transitions(void) { all_transitions(&RC_QP); }
static void ud_transitions(void) { all_transitions(&UD_QP); }
static void rc_masks(void) { all_masks(&RC_QP); }
static void ud_masks(void) { all_masks(&UD_QP); }

/* Without IBV_QP_STATE attributes change within the state. */
static void mask_without_state(void)
{
	struct end *e = fresh(&RC_QP);
	struct ibv_qp_attr a = attributes(e, IBV_QPS_RTS, IBV_QPS_RTS), got;
	struct ibv_qp_init_attr init;

	drive(&RC_QP, e, IBV_QPS_RTS);
	a.min_rnr_timer = 21;
	OK(ibv_modify_qp(e->qp, &a, IBV_QP_MIN_RNR_TIMER));
	OK(ibv_query_qp(e->qp, &got, IBV_QP_MIN_RNR_TIMER, &init));
	EQ(got.min_rnr_timer, 21);
	EQ(qp_state(e->qp), IBV_QPS_RTS);
	RC(ibv_modify_qp(e->qp, &a, IBV_QP_DEST_QPN), EINVAL);
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static void bad_values(void)
{
	struct end *e = fresh(&RC_QP);
	struct ibv_qp_attr a = attributes(e, IBV_QPS_RESET, IBV_QPS_INIT);
	int init = IBV_QP_STATE | RC_ROWS[0].required, rtr = IBV_QP_STATE | RC_ROWS[2].required, rts = IBV_QP_STATE | RC_ROWS[3].required;

	a.port_num = 2;
	RC(ibv_modify_qp(e->qp, &a, init), EINVAL);
	a.port_num = 0;
	RC(ibv_modify_qp(e->qp, &a, init), EINVAL);
	if (!is_rxe) { /* which has one and never looks at the index */
		a = attributes(e, IBV_QPS_RESET, IBV_QPS_INIT);
		a.pkey_index = port_attr.pkey_tbl_len;
		RC(ibv_modify_qp(e->qp, &a, init), EINVAL);
	}
	a.qp_state = (enum ibv_qp_state)99;
	RC(ibv_modify_qp(e->qp, &a, IBV_QP_STATE), EINVAL);
	drive(&RC_QP, e, IBV_QPS_INIT);
	a = attributes(e, IBV_QPS_INIT, IBV_QPS_RTR);
	a.ah_attr.port_num = 2;
	RC(ibv_modify_qp(e->qp, &a, rtr), EINVAL);
	a = attributes(e, IBV_QPS_INIT, IBV_QPS_RTR);
	a.ah_attr.is_global = 0;
	RC(ibv_modify_qp(e->qp, &a, rtr), EINVAL);
	a = attributes(e, IBV_QPS_INIT, IBV_QPS_RTR);
	a.path_mtu = (enum ibv_mtu)6;
	RC(ibv_modify_qp(e->qp, &a, rtr), EINVAL);
	if (!is_rxe) { /* which takes an MTU of 0 */
		a.path_mtu = (enum ibv_mtu)0;
		RC(ibv_modify_qp(e->qp, &a, rtr), EINVAL);
	}
	if (!is_rxe && dev_attr.max_qp_rd_atom < 255) { /* soft-RoCE does not look */
		a = attributes(e, IBV_QPS_INIT, IBV_QPS_RTR);
		a.max_dest_rd_atomic = (uint8_t)(dev_attr.max_qp_rd_atom + 1);
		RC(ibv_modify_qp(e->qp, &a, rtr), EINVAL);
	}
	EQ(qp_state(e->qp), IBV_QPS_INIT);
	drive(&RC_QP, e, IBV_QPS_RTR);
	a = attributes(e, IBV_QPS_RTR, IBV_QPS_RTS);
	a.timeout = 32;
	RC(ibv_modify_qp(e->qp, &a, rts), EINVAL);
	if (dev_attr.max_qp_init_rd_atom < 255) {
		a = attributes(e, IBV_QPS_RTR, IBV_QPS_RTS);
		a.max_rd_atomic = (uint8_t)(dev_attr.max_qp_init_rd_atom + 1);
		RC(ibv_modify_qp(e->qp, &a, rts), EINVAL);
	}
	EQ(qp_state(e->qp), IBV_QPS_RTR);
}

static void query_returns_what_was_set(void)
{
	struct end *e = fresh(&RC_QP);
	struct ibv_qp_attr want = attributes(e, IBV_QPS_RTR, IBV_QPS_RTS), got;
	struct ibv_qp_init_attr init;

	drive(&RC_QP, e, IBV_QPS_RTS);
	memset(&got, 0xee, sizeof(got));
	OK(ibv_query_qp(e->qp, &got, (1 << 21) - 1, &init));
	EQ(got.qp_state, IBV_QPS_RTS);
	if (!is_rxe) /* which leaves it RESET */
		EQ(got.cur_qp_state, IBV_QPS_RTS);
	EQ(got.path_mtu, want.path_mtu);
	EQ(got.rq_psn, want.rq_psn);
	EQ(got.sq_psn, want.sq_psn);
	EQ(got.dest_qp_num, want.dest_qp_num);
	EQ(got.qp_access_flags, want.qp_access_flags);
	EQ(got.pkey_index, 0);
	EQ(got.port_num, want.port_num);
	EQ(got.max_rd_atomic, want.max_rd_atomic);
	EQ(got.max_dest_rd_atomic, want.max_dest_rd_atomic);
	EQ(got.min_rnr_timer, want.min_rnr_timer);
	EQ(got.timeout, want.timeout);
	EQ(got.retry_cnt, want.retry_cnt);
	EQ(got.rnr_retry, want.rnr_retry);
	EQ(got.sq_draining, 0);
	EQ(got.ah_attr.is_global, 1);
	EQ(got.ah_attr.port_num, want.ah_attr.port_num);
	EQ(got.ah_attr.grh.sgid_index, want.ah_attr.grh.sgid_index);
	CHECK(got.ah_attr.grh.hop_limit != 0, "got 0"); /* for RoCE the route's may replace the caller's */
	EQ(got.ah_attr.grh.traffic_class, want.ah_attr.grh.traffic_class);
	EQ(memcmp(&got.ah_attr.grh.dgid, &own_gid, 16), 0);
}

static void ud_query_returns_what_was_set(void)
{
	struct end *e = fresh(&UD_QP);
	struct ibv_qp_attr got;
	struct ibv_qp_init_attr init;

	drive(&UD_QP, e, IBV_QPS_RTS);
	OK(ibv_query_qp(e->qp, &got, IBV_QP_STATE | IBV_QP_QKEY | IBV_QP_SQ_PSN | IBV_QP_PORT | IBV_QP_PKEY_INDEX, &init));
	EQ(got.qkey, UD_QKEY);
	EQ(got.port_num, port_num);
	EQ(init.qp_type, IBV_QPT_UD);
}

/* ---- posting ----------------------------------------------------------------------------------------------------- */

/* man ibv_post_send and IBA 10.8.3.1: an immediate error below RTS; receives are taken from INIT on. */
static void posting(const struct machine *m)
{
	struct end *e = fresh(m);

	if (m->type == IBV_QPT_UD) {
		struct ibv_ah_attr ah = { .is_global = 1, .port_num = port_num, .grh = { .dgid = own_gid, .sgid_index = (uint8_t)gid_index } };

		e->ah = MADE(ibv_create_ah(e->pd, &ah));
	}
	for (size_t i = 0; i < 3; i++) {
		static const enum ibv_qp_state before[] = { IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR };
		struct ibv_sge s = sge(e, 0, 8);
		struct ibv_send_wr w = { .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND }, *bad_send = NULL;
		struct ibv_recv_wr r = { .wr_id = 5, .sg_list = &s, .num_sge = 1 }, *bad_recv = NULL;

		w.wr.ud.ah = e->ah;
		drive(m, e, before[i]);
		RC(ibv_post_send(e->qp, &w, &bad_send), EINVAL);
		CHECK(is_rxe || bad_send == &w, "bad_wr was not set"); /* soft-RoCE's provider does not */
		RC(ibv_post_recv(e->qp, &r, &bad_recv), i ? 0 : EINVAL);
		if (!i)
			CHECK(is_rxe || bad_recv == &r, "bad_wr was not set");
		EMPTY(e->scq);
		EMPTY(e->rcq);
	}
	OK(qp_set_state(e->qp, IBV_QPS_ERR));
	WANT(e->rcq, 5, IBV_WC_WR_FLUSH_ERR); /* the one of RTR; the one of INIT went with the RESET */
	EMPTY(e->rcq);
}

static void rc_posting(void) { posting(&RC_QP); }
static void ud_posting(void) { posting(&UD_QP); }

/* Operations, list lengths and flags that this QP cannot take are refused at once. */
static void bad_requests(void)
{
	struct end_cfg rc = { .send_sge = 2, .recv_sge = 2 }, ud = { .type = IBV_QPT_UD };
	struct end *e = pair_loopback(&rc, &rc).a, *u = pair_loopback(&ud, &ud).a;
	struct ibv_qp_attr attr;
	struct ibv_qp_init_attr init;
	struct ibv_sge s[64];
	struct ibv_send_wr good = { .sg_list = s, .num_sge = 1, .opcode = IBV_WR_SEND }, *bad;
	struct ibv_recv_wr recv = { .sg_list = s }, *bad_recv;

	end_connect(e);
	end_connect(u);
	OK(ibv_query_qp(e->qp, &attr, IBV_QP_CAP, &init));
	CHECK(attr.cap.max_send_sge < COUNT(s) && attr.cap.max_recv_sge < COUNT(s), "more entries than asked for by far");
	for (size_t i = 0; i < COUNT(s); i++)
		s[i] = sge(e, 0, 8);
	struct ibv_send_wr w = good;
	w.num_sge = (int)attr.cap.max_send_sge + 1;
	RC(ibv_post_send(e->qp, &w, &bad), EINVAL);
	CHECK(bad == &w, "bad_wr was not set");
	recv.num_sge = (int)attr.cap.max_recv_sge + 1;
	RC(ibv_post_recv(e->qp, &recv, &bad_recv), EINVAL);
	CHECK(bad_recv == &recv, "bad_wr was not set");
	if (is_rxe)
		return; /* it takes the rest below, and fails it later or never */
	w.num_sge = -1;
	RC(ibv_post_send(e->qp, &w, &bad), EINVAL);
	recv.num_sge = -1;
	RC(ibv_post_recv(e->qp, &recv, &bad_recv), EINVAL);
	w = good;
	w.opcode = (enum ibv_wr_opcode)99;
	RC(ibv_post_send(e->qp, &w, &bad), EINVAL);
	/* UD has sends only */
	static const enum ibv_wr_opcode ops[] = { IBV_WR_RDMA_WRITE, IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_READ, IBV_WR_ATOMIC_CMP_AND_SWP,
						  IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_LOCAL_INV, IBV_WR_SEND_WITH_INV, IBV_WR_ATOMIC_WRITE };
	for (size_t i = 0; i < COUNT(ops); i++) {
		w = good;
		w.opcode = ops[i];
		RC(ibv_post_send(u->qp, &w, &bad), EINVAL);
	}
	/* what the C API has and this device has not, or only by ibv_wr_flush */
	static const int unbuilt[] = { IBV_WR_TSO, IBV_WR_DRIVER1, WR_FLUSH };
	for (size_t i = 0; i < COUNT(unbuilt); i++) {
		w = good;
		w.opcode = (enum ibv_wr_opcode)unbuilt[i];
		RC(ibv_post_send(e->qp, &w, &bad), EOPNOTSUPP);
	}
	/* a read or atomic has no inline form */
	w = good;
	w.opcode = IBV_WR_RDMA_READ;
	w.send_flags = IBV_SEND_INLINE;
	RC(ibv_post_send(e->qp, &w, &bad), EINVAL);
	EMPTY(e->scq);
	EMPTY(u->scq);
}

/* ---- SQD --------------------------------------------------------------------------------------------------------- */

/* What is posted in SQD waits there, and goes on when the QP is back in RTS. */
static void drained_queue_waits(void)
{
	struct pair p = pair_loopback(NULL, NULL);

	if (is_rxe)
		skip_case("soft-RoCE 6.1 does not take up, back in RTS, what was posted in SQD");
	end_connect(p.a);
	end_connect(p.b);
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 64, 0));
	WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	OK(qp_set_state(p.a->qp, IBV_QPS_SQD));
	reset_buf(p.b);
	memset(p.a->buf, 1, 8);
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 64, 0));
	be_late();
	EMPTY(p.a->scq);
	ALL(p.b->buf, p.b->len, GUARD);
	/* the receive side goes on */
	OK(post_receive(p.a, 3, 128, 64));
	OK(post_op(p.b, IBV_WR_SEND, 4, 256, 64, 0, 0));
	WANT(p.a->rcq, 3, IBV_WC_SUCCESS);
	WANT(p.b->scq, 4, IBV_WC_SUCCESS);
	OK(qp_set_state(p.a->qp, IBV_QPS_RTS));
	WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	ALL(p.b->buf + 64, 8, 1);
}

static void drained_event(void)
{
	struct pair p = pair_loopback(NULL, NULL);
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_SQD, .en_sqd_async_notify = 1 };
	struct ibv_async_event event;

	end_connect(p.a);
	end_connect(p.b);
	OK(ibv_modify_qp(p.a->qp, &a, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY));
	EQ(ibv_get_async_event(ctx, &event), 0);
	EQ(event.event_type, IBV_EVENT_SQ_DRAINED);
	CHECK(event.element.qp == p.a->qp, "the event is another QP's");
	ibv_ack_async_event(&event);
}

/* The event comes when the request that was under way has ended; none is left half done. */
static void drained_after_the_request_under_way(void)
{
	enum { BIG = 32 << 20 };
	struct end_cfg c = { .len = BIG };
	struct pair p = pair_loopback(&c, &c);
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_SQD, .en_sqd_async_notify = 1 };
	struct ibv_async_event event;
	struct ibv_wc wc;

	end_connect(p.a);
	end_connect(p.b);
	fill(p.a->buf, BIG, 1);
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, BIG, 0, 0));
	OK(ibv_modify_qp(p.a->qp, &a, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY));
	EQ(ibv_get_async_event(ctx, &event), 0);
	EQ(event.event_type, IBV_EVENT_SQ_DRAINED);
	ibv_ack_async_event(&event);
	if (ibv_poll_cq(p.a->scq, 1, &wc)) {
		EQ(wc.status, IBV_WC_SUCCESS);
		SAME(p.b->buf, BIG, 1);
	} else {
		ALL(p.b->buf, BIG, GUARD);
	}
}

#define CASE(name) { #name, name, LOCAL }
static const struct test_case cases[] = {
	CASE(rc_transitions), CASE(ud_transitions), CASE(rc_masks), CASE(ud_masks), CASE(mask_without_state), CASE(bad_values),
	CASE(query_returns_what_was_set), CASE(ud_query_returns_what_was_set), CASE(rc_posting), CASE(ud_posting), CASE(bad_requests),
	CASE(drained_queue_waits), CASE(drained_event), CASE(drained_after_the_request_under_way),
};
SUITE(cases)
