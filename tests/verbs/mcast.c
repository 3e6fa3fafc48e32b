/* Multicast: datagrams to a group arrive at every queue pair that is attached to it, and at no other. */
#include "common.h"

enum { GRH = 40, LEN = 8192, MULTICAST_QPN = 0xffffff };

static struct end_cfg mc_cfg(void)
{
	return (struct end_cfg){ .type = IBV_QPT_UD, .len = LEN, .inline_data = 64 };
}

/* An address of its own for each case: 239.X.Y.Z, as a GID. */
static union ibv_gid group(uint8_t last)
{
	union ibv_gid g = { .raw = { [10] = 0xff, [11] = 0xff, [12] = 239, [13] = (uint8_t)seed, [14] = (uint8_t)(seed >> 8), [15] = last } };

	return g;
}

static union ibv_gid group6(uint8_t last)
{
	union ibv_gid g = { .raw = { [0] = 0xff, [1] = 0x12, [14] = (uint8_t)seed, [15] = last } };

	return g;
}

static int post_to(struct end *a, const union ibv_gid *g, uint64_t wr_id, size_t len, uint32_t qkey)
{
	struct ibv_ah_attr attr = { .is_global = 1, .port_num = port_num, .grh = { .dgid = *g, .sgid_index = (uint8_t)gid_index, .hop_limit = 1 } };
	struct ibv_ah *ah = MADE(ibv_create_ah(a->pd, &attr));
	struct ibv_sge s = sge(a, 0, len);
	struct ibv_send_wr w = { .wr_id = wr_id, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_SEND };

	w.wr.ud.ah = ah;
	w.wr.ud.remote_qpn = MULTICAST_QPN;
	w.wr.ud.remote_qkey = qkey;
	int rc = post(a, &w, NULL);
	WANT(a->scq, wr_id, IBV_WC_SUCCESS);
	OK(ibv_destroy_ah(ah));
	return rc;
}

static void arrived(struct end *b, uint64_t wr_id, size_t len, const union ibv_gid *g, uint64_t stream)
{
	struct ibv_wc wc = WANT(b->rcq, wr_id, IBV_WC_SUCCESS);

	EQ(wc.byte_len, GRH + len);
	EQ(wc.src_qp, b->peer.qpn);
	EQ(wc.wc_flags & IBV_WC_GRH, IBV_WC_GRH);
	SAME(b->buf + GRH, len, stream);
	/* The header is the group's: IPv4's lies in the last 20 bytes (RoCEv2 annex A17.4.5.2). */
	if (g->raw[0] == 0 && own_gid.raw[0] == 0)
		EQ(memcmp(b->buf + 36, g->raw + 12, 4), 0);
	else
		EQ(memcmp(b->buf + 24, g->raw, 16), 0);
}

static void to_all_members(union ibv_gid g)
{
	enum { MEMBERS = 4 };
	static const size_t lens[] = { 1, 8, 100, 1024, 4096 };
	struct end_cfg c = mc_cfg();
	struct pair p[MEMBERS];

	for (int i = 0; i < MEMBERS; i++)
		p[i] = pair_open(&c, &c);
	struct pair stranger = pair_open(&c, &c);
	for (int i = 0; is_b && i < MEMBERS; i++)
		OK(ibv_attach_mcast(p[i].b->qp, &g, 0));
	for (size_t k = 0; k < COUNT(lens); k++) {
		for (int i = 0; is_b && i < MEMBERS; i++) {
			p[i].b->peer.qpn = p[0].b->peer.qpn;
			OK(post_receive(p[i].b, k, 0, GRH + lens[k]));
		}
		if (stranger.b)
			OK(post_receive(stranger.b, k, 0, GRH + lens[k]));
		sync_ends();
		if (is_a) {
			fill(p[0].a->buf, lens[k], k);
			OK(post_to(p[0].a, &g, k, lens[k], UD_QKEY));
		}
		for (int i = 0; is_b && i < MEMBERS; i++)
			arrived(p[i].b, k, lens[k], &g, k);
		if (stranger.b)
			EMPTY(stranger.b->rcq);
		sync_ends();
	}
	for (int i = 0; is_b && i < MEMBERS; i++)
		OK(ibv_detach_mcast(p[i].b->qp, &g, 0));
	sync_ends();
}

static void ipv4_group(void) { to_all_members(group(1)); }
static void ipv6_group(void) { to_all_members(group6(2)); }

/* Members come and go between two datagrams of one sender. */
static void joining_and_leaving(void)
{
	struct end_cfg c = mc_cfg();
	struct pair p = pair_open(&c, &c), q = pair_open(&c, &c);
	union ibv_gid g = group(3);

	if (is_b) {
		OK(ibv_attach_mcast(p.b->qp, &g, 0));
		q.b->peer.qpn = p.b->peer.qpn;
	}
	for (uint64_t round = 0; round < 6; round++) {
		bool both = round % 2;

		if (is_b) {
			OK(post_receive(p.b, round, 0, 200));
			if (both) {
				OK(post_receive(q.b, round, 0, 200));
				OK(ibv_attach_mcast(q.b->qp, &g, 0));
			}
		}
		sync_ends();
		if (is_a) {
			fill(p.a->buf, 50, round);
			OK(post_to(p.a, &g, round, 50, UD_QKEY));
		}
		if (is_b) {
			arrived(p.b, round, 50, &g, round);
			if (both) {
				arrived(q.b, round, 50, &g, round);
				OK(ibv_detach_mcast(q.b->qp, &g, 0));
			} else {
				EMPTY(q.b->rcq);
			}
		}
		sync_ends();
	}
	if (is_b)
		OK(ibv_detach_mcast(p.b->qp, &g, 0));
}

static void nobody_and_the_wrong_qkey(void)
{
	struct end_cfg c = mc_cfg();
	struct pair p = pair_open(&c, &c);
	union ibv_gid g = group(4), empty = group(5);

	if (p.b) {
		OK(ibv_attach_mcast(p.b->qp, &g, 0));
		OK(post_receive(p.b, 1, 0, 200));
	}
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 50, 9);
		OK(post_to(p.a, &empty, 1, 50, UD_QKEY));
		OK(post_to(p.a, &g, 2, 50, UD_QKEY ^ 1));
		OK(post_to(p.a, &g, 3, 50, UD_QKEY));
	}
	if (p.b) {
		arrived(p.b, 1, 50, &g, 9);
		EMPTY(p.b->rcq);
		OK(ibv_detach_mcast(p.b->qp, &g, 0));
	}
	sync_ends();
}

/* The sender may be in the group: it hears itself. */
static void a_sender_hears_itself(void)
{
	struct end_cfg c = mc_cfg();
	struct pair p = pair_loopback(&c, &c);
	union ibv_gid g = group((uint8_t)(6 + is_b));

	end_connect(p.a);
	OK(ibv_attach_mcast(p.a->qp, &g, 0));
	OK(ibv_attach_mcast(p.a->qp, &g, 0)); /* twice is once */
	OK(post_receive(p.a, 1, 1000, 200));
	OK(post_to(p.a, &g, 2, 50, UD_QKEY));
	EQ(WANT(p.a->rcq, 1, IBV_WC_SUCCESS).src_qp, p.a->qp->qp_num);
	RC(ibv_destroy_qp(p.a->qp), EBUSY);
	OK(ibv_detach_mcast(p.a->qp, &g, 0));
	RC(ibv_detach_mcast(p.a->qp, &g, 0), EINVAL);
}

static void what_cannot_be_attached(void)
{
	struct end_cfg c = mc_cfg();
	struct pair ud = pair_loopback(&c, &c), rc = pair_loopback(NULL, NULL);
	union ibv_gid g = group(8);

	RC(ibv_attach_mcast(rc.a->qp, &g, 0), EINVAL);
	RC(ibv_attach_mcast(ud.a->qp, &own_gid, 0), EINVAL);
	RC(ibv_detach_mcast(ud.a->qp, &g, 0), EINVAL);
	CHECK(dev_attr.max_mcast_grp > 0 && dev_attr.max_mcast_qp_attach > 0 && dev_attr.max_total_mcast_qp_attach > 0);
}

/* A queue pair that leaves without a word is not sent to any more. */
static void a_member_is_destroyed(void)
{
	struct end_cfg c = mc_cfg();
	struct pair p = pair_open(&c, &c), q = pair_open(&c, &c);
	union ibv_gid g = group(9);

	if (is_b) {
		OK(ibv_attach_mcast(p.b->qp, &g, 0));
		OK(ibv_attach_mcast(q.b->qp, &g, 0));
		OK(post_receive(p.b, 1, 0, 200));
		OK(post_receive(p.b, 2, 200, 200));
		OK(post_receive(q.b, 1, 0, 200));
	}
	sync_ends();
	if (is_a)
		OK(post_to(p.a, &g, 1, 50, UD_QKEY));
	if (is_b) {
		WANT(p.b->rcq, 1, IBV_WC_SUCCESS);
		WANT(q.b->rcq, 1, IBV_WC_SUCCESS);
		OK(ibv_detach_mcast(q.b->qp, &g, 0));
		end_destroy_qp(q.b);
	}
	sync_ends();
	if (is_a)
		OK(post_to(p.a, &g, 2, 50, UD_QKEY));
	if (is_b) {
		WANT(p.b->rcq, 2, IBV_WC_SUCCESS);
		OK(ibv_detach_mcast(p.b->qp, &g, 0));
	}
	sync_ends();
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(ipv4_group), CASE(ipv6_group), CASE(joining_and_leaving), CASE(nobody_and_the_wrong_qkey),
	{ "a_sender_hears_itself", a_sender_hears_itself, LOCAL }, { "what_cannot_be_attached", what_cannot_be_attached, LOCAL },
	CASE(a_member_is_destroyed),
};
SUITE(cases)
