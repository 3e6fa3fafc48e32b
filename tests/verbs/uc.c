/* UC: a connection that delivers in order, or not at all and tells nobody. */
#include "common.h"

#include <arpa/inet.h>

enum { LEN = 1 << 20, UC_OPS = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM };

static struct end_cfg uc_cfg(void)
{
	return (struct end_cfg){ .type = IBV_QPT_UC, .len = LEN, .inline_data = 64 };
}

/* What a sender of UC always sees of a request that was fine at its own end. */
static void sent(struct end *a, uint64_t wr_id)
{
	WANT(a->scq, wr_id, IBV_WC_SUCCESS);
	EQ(qp_state(a->qp), IBV_QPS_RTS);
}

static void sizes_by(uint64_t ops, enum ibv_wr_opcode op)
{
	static const size_t lens[] = { 0, 1, 40, 41, 4096, 4097, 300000, LEN };
	struct end_cfg c = uc_cfg();
	c.send_ops = ops;
	struct pair p = pair_open(&c, &c);
	bool receives = op != IBV_WR_RDMA_WRITE;

	for (size_t i = 0; i < COUNT(lens); i++) {
		if (p.b) {
			reset_buf(p.b);
			if (receives)
				OK(post_receive(p.b, i, 0, lens[i]));
		}
		sync_ends();
		if (p.a) {
			fill(p.a->buf, lens[i], i);
			OK(post_op(p.a, op, i, 0, lens[i], 0, 0));
			sent(p.a, i);
		}
		if (p.b && receives) {
			struct ibv_wc wc = WANT(p.b->rcq, i, IBV_WC_SUCCESS);

			EQ(wc.byte_len, lens[i]);
			EQ(wc.qp_num, p.b->qp->qp_num);
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

static void send_post(void) { sizes_by(0, IBV_WR_SEND); }
static void send_wr(void) { sizes_by(UC_OPS, IBV_WR_SEND); }
static void write_post(void) { sizes_by(0, IBV_WR_RDMA_WRITE); }
static void write_wr(void) { sizes_by(UC_OPS, IBV_WR_RDMA_WRITE); }
static void write_imm_post(void) { sizes_by(0, IBV_WR_RDMA_WRITE_WITH_IMM); }

/* The first has no receive and is lost; the second arrives, and nobody has failed. */
static void without_a_receive_it_is_lost(void)
{
	struct end_cfg c = uc_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		fill(p.a->buf, 100, 1);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 50, 0, 0));
		sent(p.a, 1);
	}
	sync_ends();
	if (p.b)
		OK(post_receive(p.b, 9, 0, 100));
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_SEND, 2, 0, 100, 0, 0));
		sent(p.a, 2);
	}
	if (p.b) {
		EQ(WANT(p.b->rcq, 9, IBV_WC_SUCCESS).byte_len, 100);
		SAME(p.b->buf, 100, 1);
		EMPTY(p.b->rcq);
		EQ(qp_state(p.b->qp), IBV_QPS_RTS);
	}
}

/* The receive is too short: the message is lost, and the receive is there for the next. */
static void too_long_for_the_receive_it_is_lost(void)
{
	struct end_cfg c = uc_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b)
		OK(post_receive(p.b, 9, 0, 100));
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 200, 1);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 200, 0, 0));
		sent(p.a, 1);
		OK(post_op(p.a, IBV_WR_SEND, 2, 0, 100, 0, 0));
		sent(p.a, 2);
	}
	if (p.b) {
		EQ(WANT(p.b->rcq, 9, IBV_WC_SUCCESS).byte_len, 100);
		EQ(qp_state(p.b->qp), IBV_QPS_RTS);
	}
}

static void a_wrong_key_writes_nothing_and_nobody_is_told(void)
{
	struct end_cfg c = uc_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 64);
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE };

		w.wr.rdma.remote_addr = p.a->peer.addr;
		w.wr.rdma.rkey = p.a->peer.rkey ^ 0x1000;
		OK(post(p.a, &w, NULL));
		sent(p.a, 1);
	}
	sync_ends();
	if (p.b) {
		ALL(p.b->buf, 64, GUARD);
		EQ(qp_state(p.b->qp), IBV_QPS_RTS);
	}
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 64, 3);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 64, 0, 0));
		sent(p.a, 2);
	}
	sync_ends();
	if (p.b)
		SAME(p.b->buf, 64, 3);
}

/* READ, atomics and atomic WRITE need an answer, which UC does not have (IB spec vol. 1, table 38). */
static void what_needs_an_answer_is_refused(void)
{
	static const enum ibv_wr_opcode ops[] = { IBV_WR_RDMA_READ, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WR_ATOMIC_CMP_AND_SWP,
						  IBV_WR_ATOMIC_WRITE };
	struct end_cfg c = uc_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a)
		for (size_t i = 0; i < COUNT(ops); i++)
			RC(post_op(p.a, ops[i], i, 0, 8, 0, 0), EINVAL);
}

/* A request that fails at its own end stops the send queue only (SQE), and a modify to RTS starts it again. */
static void a_failed_send_stops_the_send_queue(void)
{
	struct end_cfg c = uc_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 64);
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };

		s.lkey ^= 0x1000;
		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 1, IBV_WC_LOC_PROT_ERR);
		EQ(qp_state(p.a->qp), IBV_QPS_SQE);
		OK(qp_set_state(p.a->qp, IBV_QPS_RTS));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 64, 0, 0));
		sent(p.a, 2);
	}
}

/* Nobody is at the other end. */
static void without_a_peer_it_is_lost(void)
{
	struct end_cfg c = uc_cfg();
	struct pair p = pair_create(&c, &c);

	if (p.a) {
		end_connect(p.a);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 8, 0, 0));
		sent(p.a, 1);
	}
	sync_ends();
}

static void post_key(struct end *e, uint64_t wr_id, enum ibv_wr_opcode op, struct ibv_mw *mw, uint32_t rkey)
{
	struct ibv_send_wr w = { .wr_id = wr_id, .opcode = op, .invalidate_rkey = rkey }, *bad;

	if (mw) {
		w.bind_mw.mw = mw;
		w.bind_mw.rkey = rkey;
		w.bind_mw.bind_info = (struct ibv_mw_bind_info){ e->mr, (uintptr_t)e->buf, 4096, IBV_ACCESS_REMOTE_WRITE };
	}
	OK(ibv_post_send(e->qp, &w, &bad));
	if (op != IBV_WR_SEND_WITH_INV)
		sent(e, wr_id);
}

/* The end of a window is told to the other side; what is written by its key afterwards is lost without a word. */
static void a_memory_window(void)
{
	struct end_cfg c = uc_cfg();
	c.mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND;
	struct pair p = pair_open(&c, &c);
	struct ibv_mw *mw = p.b ? MADE(ibv_alloc_mw(p.b->pd, IBV_MW_TYPE_2)) : NULL;
	uint32_t rkey = (uint32_t)from_b(mw ? mw->rkey : 0);

	if (p.b) {
		post_key(p.b, 1, IBV_WR_BIND_MW, mw, rkey);
		OK(post_receive(p.b, 9, 8192, 0));
	}
	sync_ends();
	for (uint64_t round = 0; round < 2; round++) {
		if (p.a) {
			struct ibv_sge s = sge(p.a, 0, 64);
			struct ibv_send_wr w = { .wr_id = round, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE, .wr.rdma = { p.a->peer.addr, rkey } };

			fill(p.a->buf, 64, round);
			OK(post(p.a, &w, NULL));
			sent(p.a, round);
			if (round == 0) {
				post_key(p.a, 5, IBV_WR_SEND_WITH_INV, NULL, rkey);
				sent(p.a, 5);
			}
		}
		sync_ends();
		if (p.b)
			SAME(p.b->buf, 64, 0);
		sync_ends();
	}
	if (p.b) {
		struct ibv_wc wc = WANT(p.b->rcq, 9, IBV_WC_SUCCESS);

		EQ(wc.wc_flags & IBV_WC_WITH_INV, IBV_WC_WITH_INV);
		EQ(wc.invalidated_rkey, rkey);
		post_key(p.b, 2, IBV_WR_BIND_MW, mw, rkey);
		post_key(p.b, 3, IBV_WR_LOCAL_INV, NULL, rkey);
		OK(ibv_dealloc_mw(mw));
	}
	sync_ends();
}

static const struct test_case cases[] = {
	{ "send_post", send_post, 0 },
	{ "send_wr", send_wr, 0 },
	{ "write_post", write_post, 0 },
	{ "write_wr", write_wr, 0 },
	{ "write_imm_post", write_imm_post, 0 },
	{ "without_a_receive_it_is_lost", without_a_receive_it_is_lost, 0 },
	{ "too_long_for_the_receive_it_is_lost", too_long_for_the_receive_it_is_lost, 0 },
	{ "a_wrong_key_writes_nothing_and_nobody_is_told", a_wrong_key_writes_nothing_and_nobody_is_told, 0 },
	{ "what_needs_an_answer_is_refused", what_needs_an_answer_is_refused, 0 },
	{ "a_failed_send_stops_the_send_queue", a_failed_send_stops_the_send_queue, 0 },
	{ "without_a_peer_it_is_lost", without_a_peer_it_is_lost, 0 },
	{ "a_memory_window", a_memory_window, 0 },
};
SUITE(cases)
