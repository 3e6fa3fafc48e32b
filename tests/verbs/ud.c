/* UD: datagrams with a global routing header, addressed per request, that arrive whole or not at all. */
#include "common.h"

#include <arpa/inet.h>

enum { GRH = 40, LEN = 8192, UD_OPS = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM };

static const uint32_t IMM = 0xa1b2c3d4;

static size_t mtu(void)
{
	return (size_t)128 << port_attr.active_mtu;
}

static struct end_cfg ud_cfg(void)
{
	return (struct end_cfg){ .type = IBV_QPT_UD, .len = LEN, .send_sge = 4, .recv_sge = 4, .inline_data = 64 };
}

/* B's completion, checked against who sent it. */
static struct ibv_wc arrived_at(int line, struct end *b, uint64_t wr_id, size_t len)
{
	struct ibv_wc wc = want_at(__FILE__, line, b->rcq, wr_id, IBV_WC_SUCCESS);

	EQ(wc.opcode, IBV_WC_RECV);
	EQ(wc.byte_len, GRH + len);
	EQ(wc.qp_num, b->qp->qp_num);
	EQ(wc.src_qp, b->peer.qpn);
	EQ(wc.wc_flags & IBV_WC_GRH, IBV_WC_GRH);
	EQ(wc.pkey_index, 0);
	return wc;
}
#define ARRIVED(b, wr_id, len) arrived_at(__LINE__, b, wr_id, len)

/* ---- contents ---------------------------------------------------------------------------------------------------- */

static void sizes_by(uint64_t ops)
{
	static const size_t lens[] = { 0, 1, 2, 3, 63, 64, 255, 256, 1000, 1024, 2048, 4096 };
	struct end_cfg c = ud_cfg();
	c.send_ops = ops;
	struct pair p = pair_open(&c, &c);

	for (size_t i = 0; i < COUNT(lens) && lens[i] <= mtu(); i++) {
		if (p.b) {
			reset_buf(p.b);
			OK(post_receive(p.b, i, 100, GRH + lens[i]));
		}
		sync_ends();
		if (p.a) {
			fill(p.a->buf, lens[i], i);
			OK(post_op(p.a, IBV_WR_SEND, i, 0, lens[i], 0, 0));
			EQ(WANT(p.a->scq, i, IBV_WC_SUCCESS).opcode, IBV_WC_SEND);
		}
		if (p.b) {
			struct ibv_wc wc = ARRIVED(p.b, i, lens[i]);

			EQ(wc.wc_flags & IBV_WC_WITH_IMM, 0);
			SAME(p.b->buf + 100 + GRH, lens[i], i);
			ALL(p.b->buf, 100, GUARD);
			ALL(p.b->buf + 100 + GRH + lens[i], 200, GUARD);
			MARGINS(p.b);
		}
		sync_ends();
	}
}

static void sizes_post(void) { sizes_by(0); }
static void sizes_wr(void) { sizes_by(UD_OPS); }

static void immediate(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b)
		OK(post_receive(p.b, 1, 0, 200));
	sync_ends();
	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 17);
		struct ibv_send_wr w = { .wr_id = 2, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND_WITH_IMM, .imm_data = htonl(IMM) };

		w.wr.ud.ah = p.a->ah;
		w.wr.ud.remote_qpn = p.a->peer.qpn;
		w.wr.ud.remote_qkey = UD_QKEY;
		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	if (p.b) {
		struct ibv_wc wc = ARRIVED(p.b, 1, 17);

		EQ(wc.wc_flags & IBV_WC_WITH_IMM, IBV_WC_WITH_IMM);
		EQ(ntohl(wc.imm_data), IMM);
	}
}

/* The first 40 bytes: for IPv4 the header is in the last 20 of them, the first 20 are undefined (RoCEv2 annex A17.4.5.2). */
static void global_routing_header(void)
{
	static const uint8_t v4_prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b)
		OK(post_receive(p.b, 1, 0, 200));
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 60, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	if (p.b) {
		const uint8_t *grh = p.b->buf, *ip = grh + 20;

		ARRIVED(p.b, 1, 60);
		if (!memcmp(own_gid.raw, v4_prefix, 12)) {
			EQ(ip[0], 0x45);
			EQ(ip[9], 17); /* UDP */
			EQ(memcmp(ip + 12, p.b->peer.gid + 12, 4), 0);
			EQ(memcmp(ip + 16, own_gid.raw + 12, 4), 0);
		} else {
			EQ(grh[0] >> 4, 6);
			EQ(memcmp(grh + 8, p.b->peer.gid, 16), 0);
			EQ(memcmp(grh + 24, own_gid.raw, 16), 0);
		}
	}
}

static void scatter_gather_inline(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	for (int inl = 0; inl < 2; inl++) {
		if (p.b) {
			struct ibv_sge s[3] = { sge(p.b, 0, GRH), sge(p.b, 500, 7), sge(p.b, 1000, 100) };
			struct ibv_recv_wr r = { .wr_id = 1, .sg_list = s, .num_sge = 3 }, *bad;

			reset_buf(p.b);
			OK(ibv_post_recv(p.b->qp, &r, &bad));
		}
		sync_ends();
		if (p.a) {
			struct ibv_sge s[2] = { sge(p.a, 0, 5), sge(p.a, 5, 40) };
			struct ibv_send_wr w = { .wr_id = 2, .sg_list = s, .num_sge = 2, .opcode = IBV_WR_SEND, .send_flags = inl ? IBV_SEND_INLINE : 0 };

			fill(p.a->buf, 7, 1);
			fill(p.a->buf + 7, 38, 2);
			w.wr.ud.ah = p.a->ah;
			w.wr.ud.remote_qpn = p.a->peer.qpn;
			w.wr.ud.remote_qkey = UD_QKEY;
			OK(post(p.a, &w, NULL));
			if (inl)
				memset(p.a->buf, 0, 64);
			WANT(p.a->scq, 2, IBV_WC_SUCCESS);
		}
		if (p.b) {
			ARRIVED(p.b, 1, 45);
			SAME(p.b->buf + 500, 7, 1);
			SAME(p.b->buf + 1000, 38, 2);
			ALL(p.b->buf + 507, 400, GUARD);
			ALL(p.b->buf + 1038, 400, GUARD);
		}
		sync_ends();
	}
}

/* ---- what does not arrive ---------------------------------------------------------------------------------------- */

/*
 * Sends `probe`, which must vanish, and then a good one, which shows that the first is not merely late: between two UD
 * QPs datagrams of one sender on one path stay in order.  The sender's completions are both good: it cannot know.
 */
static void vanishes(struct pair *p, struct ibv_send_wr probe)
{
	if (p->b)
		OK(post_receive(p->b, 1, 0, 200));
	sync_ends();
	if (p->a) {
		struct ibv_sge s = sge(p->a, 0, 33);

		probe.wr_id = 8;
		probe.sg_list = &s;
		probe.num_sge = 1;
		probe.opcode = IBV_WR_SEND;
		probe.wr.ud.ah = p->a->ah;
		OK(post(p->a, &probe, NULL));
		WANT(p->a->scq, 8, IBV_WC_SUCCESS);
		OK(post_op(p->a, IBV_WR_SEND, 9, 0, 44, 0, 0));
		WANT(p->a->scq, 9, IBV_WC_SUCCESS);
	}
	if (p->b) {
		ARRIVED(p->b, 1, 44);
		EMPTY(p->b->rcq);
	}
	sync_ends();
}

static void wrong_qkey(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_send_wr w = { .next = NULL };

	if (p.a) {
		w.wr.ud.remote_qpn = p.a->peer.qpn;
		w.wr.ud.remote_qkey = UD_QKEY ^ 1;
	}
	vanishes(&p, w);
}

static void no_such_qp(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);
	struct ibv_send_wr w = { .next = NULL };

	w.wr.ud.remote_qpn = 0xfffff0;
	w.wr.ud.remote_qkey = UD_QKEY;
	vanishes(&p, w);
}

/* An RC QP takes no datagrams. */
static void to_an_rc_qp(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c), rc = pair_open(NULL, NULL);
	struct ibv_send_wr w = { .next = NULL };

	if (rc.b)
		OK(post_receive(rc.b, 1, 0, 200));
	if (rc.a)
		w.wr.ud.remote_qpn = rc.a->peer.qpn;
	w.wr.ud.remote_qkey = UD_QKEY;
	vanishes(&p, w);
	if (rc.b)
		EMPTY(rc.b->rcq);
}

/* Set bit 31 of the requested key and the QP's own is sent instead (IBA 3.5.3, man ibv_post_send's notes on privileged keys). */
static void high_bit_qkey_means_own(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (is_rxe)
		skip_case("soft-RoCE 6.1 sends the key as it was given");
	if (p.b)
		OK(post_receive(p.b, 1, 0, 200));
	sync_ends();
	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 33);
		struct ibv_send_wr w = { .wr_id = 3, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };

		w.wr.ud.ah = p.a->ah;
		w.wr.ud.remote_qpn = p.a->peer.qpn;
		w.wr.ud.remote_qkey = 0x80000000;
		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 3, IBV_WC_SUCCESS);
	}
	if (p.b)
		ARRIVED(p.b, 1, 33);
}

static void no_receive_posted(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c), behind = pair_open(&c, &c);

	if (behind.b)
		OK(post_receive(behind.b, 0, 0, 200));
	sync_ends();
	for (uint64_t i = 0; p.a && i < 10; i++) {
		OK(post_op(p.a, IBV_WR_SEND, i, 0, 10, 0, 0));
		WANT(p.a->scq, i, IBV_WC_SUCCESS);
	}
	if (behind.a) {
		OK(post_op(behind.a, IBV_WR_SEND, 10, 0, 20, 0, 0));
		WANT(behind.a->scq, 10, IBV_WC_SUCCESS);
	}
	if (behind.b)
		ARRIVED(behind.b, 0, 20); /* so the others are not on their way any more */
	if (p.b) {
		/* nothing is kept for a receive that comes later: it gets the next datagram */
		be_late();
		OK(post_receive(p.b, 1, 0, 200));
	}
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_SEND, 11, 0, 50, 0, 0));
		WANT(p.a->scq, 11, IBV_WC_SUCCESS);
	}
	if (p.b)
		ARRIVED(p.b, 1, 50);
}

/* A datagram longer than the receive does not touch what is beyond it; providers drop it or fail the receive. */
static void receive_too_small(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b)
		OK(post_receive(p.b, 1, 0, GRH + 99));
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 100, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
		OK(post_op(p.a, IBV_WR_SEND, 2, 0, 20, 0, 0));
		WANT(p.a->scq, 2, IBV_WC_SUCCESS);
	}
	if (p.b) {
		struct ibv_wc wc = WAIT(p.b->rcq);

		EQ(wc.wr_id, 1);
		if (wc.status == IBV_WC_SUCCESS)
			EQ(wc.byte_len, GRH + 20);
		else if (!is_rxe) /* which says LOC_QP_OP_ERR */
			EQ(wc.status, IBV_WC_LOC_LEN_ERR);
		ALL(p.b->buf + GRH + 99, 200, GUARD);
	}
}

/* Longer than the path's MTU: refused at once, or completed in error; never sent. */
static void longer_than_mtu(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.b)
		OK(post_receive(p.b, 1, 0, LEN));
	sync_ends();
	if (p.a) {
		int rc = post_op(p.a, IBV_WR_SEND, 1, 0, mtu() + 1, 0, 0);

		if (rc)
			EQ(rc, EINVAL);
		else if (is_rxe)
			WAIT(p.a->scq); /* it drops the datagram and calls that a success */
		else
			WANT(p.a->scq, 1, IBV_WC_LOC_LEN_ERR);
	}
	sync_ends();
	if (p.b) {
		be_late();
		EMPTY(p.b->rcq);
		ALL(p.b->buf, p.b->len, GUARD);
	}
}

/* A local fault fails the request and the send queue with it, the receive queue goes on. */
static void local_key_wrong(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a) {
		struct ibv_sge s = sge(p.a, 0, 33);
		struct ibv_send_wr w = { .wr_id = 3, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };

		s.lkey ^= 0x5500;
		w.wr.ud.ah = p.a->ah;
		w.wr.ud.remote_qpn = p.a->peer.qpn;
		w.wr.ud.remote_qkey = UD_QKEY;
		OK(post(p.a, &w, NULL));
		struct ibv_wc wc = WAIT(p.a->scq);
		EQ(wc.wr_id, 3);
		EQ(wc.status, is_rxe ? IBV_WC_LOC_QP_OP_ERR : IBV_WC_LOC_PROT_ERR);
		enum ibv_qp_state state = qp_state(p.a->qp);
		CHECK(state == IBV_QPS_SQE || state == IBV_QPS_ERR, "got %d", state);
	}
	sync_ends();
}

/* ---- addressing -------------------------------------------------------------------------------------------------- */

/* B answers whoever wrote, with nothing but the completion and the header. */
static void reply_to_wc(void)
{
	struct end_cfg c = ud_cfg();
	struct pair p = pair_open(&c, &c);

	if (p.a)
		OK(post_receive(p.a, 4, 1000, 200));
	if (p.b)
		OK(post_receive(p.b, 1, 0, 200));
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 70, 1);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 70, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	if (p.b) {
		struct ibv_wc wc = ARRIVED(p.b, 1, 70);
		struct ibv_ah_attr attr;

		OK(ibv_init_ah_from_wc(ctx, port_num, &wc, (struct ibv_grh *)p.b->buf, &attr));
		EQ(attr.is_global, 1);
		EQ(memcmp(&attr.grh.dgid, p.b->peer.gid, 16), 0);
		struct ibv_ah *ah = MADE(ibv_create_ah_from_wc(p.b->pd, &wc, (struct ibv_grh *)p.b->buf, port_num));
		struct ibv_sge s = sge(p.b, GRH, 70);
		struct ibv_send_wr w = { .wr_id = 2, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };

		w.wr.ud.ah = ah;
		w.wr.ud.remote_qpn = wc.src_qp;
		w.wr.ud.remote_qkey = UD_QKEY;
		OK(post(p.b, &w, NULL));
		WANT(p.b->scq, 2, IBV_WC_SUCCESS);
		OK(ibv_destroy_ah(ah));
	}
	if (p.a) {
		ARRIVED(p.a, 4, 70);
		SAME(p.a->buf + 1000 + GRH, 70, 1);
	}
}

/* Several senders to one receiver: each datagram names its own, and each one's stay in order. */
static void several_senders(void)
{
	enum { SENDERS = 4, EACH = 12 };
	struct end_cfg c = ud_cfg();
	struct pair p[SENDERS];
	uint64_t next[SENDERS] = { 0 }, to = 0;

	for (int i = 0; i < SENDERS; i++)
		p[i] = pair_open(&c, &c);
	struct end *b = p[0].b;
	for (uint64_t i = 0; b && i < SENDERS * EACH; i++)
		OK(post_receive(b, i, 64 * i, 64));
	to = from_b(b ? b->qp->qp_num : 0);
	sync_ends();
	for (uint64_t k = 0; is_a && k < EACH; k++)
		for (uint64_t i = 0; i < SENDERS; i++) {
			p[i].a->buf[0] = (uint8_t)i;
			p[i].a->buf[1] = (uint8_t)k;
			p[i].a->peer.qpn = (uint32_t)to;
			OK(post_op(p[i].a, IBV_WR_SEND, k, 0, 2, 0, 0));
			WANT(p[i].a->scq, k, IBV_WC_SUCCESS);
		}
	for (uint64_t n = 0; b && n < SENDERS * EACH; n++) {
		struct ibv_wc wc = WANT(b->rcq, n, IBV_WC_SUCCESS);
		const uint8_t *data = b->buf + 64 * n + GRH;

		CHECK(data[0] < SENDERS, "got %u", data[0]);
		EQ(wc.src_qp, p[data[0]].b->peer.qpn);
		EQ(data[1], next[data[0]]++);
	}
	sync_ends();
}

/* What has completed is on the wire, and goes on when its queue pair does not. */
static void sent_before_the_end(void)
{
	enum { ROUNDS = 16, EACH = 8 };
	struct end_cfg c = ud_cfg();

	for (int round = 0; round < ROUNDS; round++) {
		struct pair p = pair_open(&c, &c);

		for (uint64_t i = 0; p.b && i < EACH; i++)
			OK(post_receive(p.b, i, 100 * i, 100));
		sync_ends();
		for (uint64_t i = 0; p.a && i < EACH; i++)
			OK(post_op(p.a, IBV_WR_SEND, i, 0, 10 + i, 0, 0));
		for (uint64_t i = 0; p.a && i < EACH; i++)
			WANT(p.a->scq, i, IBV_WC_SUCCESS);
		if (p.a)
			end_destroy_qp(p.a);
		for (uint64_t i = 0; p.b && i < EACH; i++)
			ARRIVED(p.b, i, 10 + i);
		sync_ends();
	}
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	{ "sizes/post", sizes_post, 0 },
	{ "sizes/wr", sizes_wr, 0 },
	CASE(immediate), CASE(global_routing_header), CASE(scatter_gather_inline), CASE(wrong_qkey), CASE(no_such_qp), CASE(to_an_rc_qp),
	CASE(high_bit_qkey_means_own), CASE(no_receive_posted), CASE(receive_too_small), CASE(longer_than_mtu), CASE(local_key_wrong),
	CASE(reply_to_wc), CASE(several_senders), CASE(sent_before_the_end),
};
SUITE(cases)
