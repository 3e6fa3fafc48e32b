/* The device and its limits: every query answers, agrees with the others, and states limits that hold. */
#include "common.h"

#include <fcntl.h>
#include <poll.h>

/* ---- the list and names ------------------------------------------------------------------------------------------ */

static void device_list(void)
{
	int count = -1;
	struct ibv_device **list = MADE(ibv_get_device_list(&count));

	CHECK(count >= 1, "got %d", count);
	for (int i = 0; i < count; i++) {
		CHECK(list[i], "entry %d of %d is NULL", i, count);
		CHECK(*ibv_get_device_name(list[i]), "an empty name");
		CHECK(ibv_get_device_guid(list[i]) != 0, "%s has no GUID", ibv_get_device_name(list[i]));
		EQ(list[i]->node_type, IBV_NODE_CA);
		EQ(list[i]->transport_type, IBV_TRANSPORT_IB);
	}
	CHECK(!list[count], "the list does not end with NULL");
	ibv_free_device_list(list);
	list = MADE(ibv_get_device_list(NULL));
	ibv_free_device_list(list);
}

/* The list may be freed while a device is open, and the device opened twice. */
static void open_twice(void)
{
	struct ibv_device **list = MADE(ibv_get_device_list(NULL));
	size_t i = 0;

	while (list[i] && strcmp(ibv_get_device_name(list[i]), ibv_get_device_name(ctx->device)))
		i++;
	struct ibv_context *one = MADE(ibv_open_device(list[i])), *two = MADE(ibv_open_device(list[i]));
	ibv_free_device_list(list);
	struct ibv_device_attr attr;

	CHECK(one != two && one->async_fd != two->async_fd, "two opens gave one context");
	OK(ibv_close_device(one));
	OK(ibv_query_device(two, &attr));
	EQ(attr.node_guid, dev_attr.node_guid);
	OK(ibv_close_device(two));
}

static void names_for_enums(void)
{
	CHECK(!strcmp(ibv_node_type_str(IBV_NODE_CA), "InfiniBand channel adapter"), "got %s", ibv_node_type_str(IBV_NODE_CA));
	CHECK(!strcmp(ibv_port_state_str(IBV_PORT_ACTIVE), "active"), "got %s", ibv_port_state_str(IBV_PORT_ACTIVE));
	CHECK(!strcmp(ibv_wc_status_str(IBV_WC_SUCCESS), "success"), "got %s", ibv_wc_status_str(IBV_WC_SUCCESS));
	CHECK(!strcmp(ibv_wc_status_str(IBV_WC_RNR_RETRY_EXC_ERR), "RNR retry counter exceeded"), "got %s",
	      ibv_wc_status_str(IBV_WC_RNR_RETRY_EXC_ERR));
	CHECK(!strcmp(ibv_event_type_str(IBV_EVENT_QP_FATAL), "local work queue catastrophic error"), "got %s",
	      ibv_event_type_str(IBV_EVENT_QP_FATAL));
}

static void rates(void)
{
	EQ(ibv_rate_to_mult(IBV_RATE_10_GBPS), 4);
	EQ(mult_to_ibv_rate(4), IBV_RATE_10_GBPS);
	EQ(ibv_rate_to_mbps(IBV_RATE_100_GBPS), 103125);
	EQ(mbps_to_ibv_rate(103125), IBV_RATE_100_GBPS);
}

/* ---- queries ----------------------------------------------------------------------------------------------------- */

static void query_device(void)
{
	struct ibv_device_attr a;

	memset(&a, 0xee, sizeof(a));
	OK(ibv_query_device(ctx, &a));
	CHECK(memchr(a.fw_ver, 0, sizeof(a.fw_ver)), "fw_ver has no end");
	EQ(a.node_guid, ibv_get_device_guid(ctx->device));
	CHECK(a.sys_image_guid != 0, "sys_image_guid is 0");
	CHECK(a.vendor_id != 0, "vendor_id is 0");
	EQ(a.phys_port_cnt, 1);
	CHECK(a.max_sge >= 16, "got %d", a.max_sge);
	CHECK(a.max_sge_rd >= 1, "got %d", a.max_sge_rd);
	CHECK(a.max_qp >= 256 && a.max_cq >= 256 && a.max_pd >= 16 && a.max_ah >= 16, "got %d %d %d %d", a.max_qp, a.max_cq, a.max_pd, a.max_ah);
	CHECK(a.max_qp_wr >= 1024 && a.max_cqe >= 4096, "got %d %d", a.max_qp_wr, a.max_cqe);
	CHECK(a.max_mr >= 20000, "got %d", a.max_mr);
	CHECK(a.max_mr_size >= 1ull << 30, "got %" PRIu64, a.max_mr_size);
	CHECK(a.page_size_cap & 4096, "got 0x%" PRIx64, a.page_size_cap);
	CHECK(a.max_qp_rd_atom >= 1 && a.max_qp_init_rd_atom >= 1, "got %d %d", a.max_qp_rd_atom, a.max_qp_init_rd_atom);
	CHECK(a.max_pkeys >= 1, "got %d", a.max_pkeys);
	CHECK(a.atomic_cap == IBV_ATOMIC_HCA || a.atomic_cap == IBV_ATOMIC_GLOB, "got %d", a.atomic_cap);
}

static void query_device_ex(void)
{
	struct ibv_device_attr_ex ex;

	memset(&ex, 0xee, sizeof(ex));
	OK(ibv_query_device_ex(ctx, NULL, &ex));
	EQ(ex.comp_mask, 0);
	EQ(memcmp(&ex.orig_attr, &dev_attr, offsetof(struct ibv_device_attr, phys_port_cnt) + 1), 0);
	if (!is_rxe) /* 6.1 leaves it 0 for a device with one port */
		EQ(ex.phys_port_cnt_ex, 1);
	struct ibv_query_device_ex_input in = { .comp_mask = 1u << 31 };
	RC(ibv_query_device_ex(ctx, &in, &ex), EINVAL);
}

static void query_port(void)
{
	struct ibv_port_attr p;

	memset(&p, 0xee, sizeof(p));
	OK(ibv_query_port(ctx, port_num, &p));
	EQ(p.state, IBV_PORT_ACTIVE);
	EQ(p.phys_state, 5);
	EQ(p.link_layer, IBV_LINK_LAYER_ETHERNET);
	CHECK(p.lid == 0 || p.lid == (own_gid.raw[14] << 8 | own_gid.raw[15]), "got %#x", p.lid); /* RoCE has none */
	CHECK(p.active_mtu >= IBV_MTU_256 && p.active_mtu <= p.max_mtu && p.max_mtu <= IBV_MTU_4096, "got %d of %d", p.active_mtu, p.max_mtu);
	CHECK(p.gid_tbl_len > gid_index && p.pkey_tbl_len >= 1, "got %d %d", p.gid_tbl_len, p.pkey_tbl_len);
	CHECK(p.max_msg_sz >= 1 << 20, "got %u", p.max_msg_sz);
	CHECK(p.active_width && p.active_speed, "got %d %d", p.active_width, p.active_speed);
	CHECK(ibv_query_port(ctx, 0, &p) != 0, "port 0 was answered");
	CHECK(ibv_query_port(ctx, 2, &p) != 0, "port 2 was answered");
	CHECK(ibv_query_port(ctx, 255, &p) != 0, "port 255 was answered");
}

static void query_gid(void)
{
	union ibv_gid gid, zero = { .raw = { 0 } };

	EQ(ibv_query_gid(ctx, port_num, gid_index, &gid), 0);
	CHECK(memcmp(&gid, &zero, 16) != 0, "the GID is zero");
	EQ(ibv_query_gid(ctx, port_num, port_attr.gid_tbl_len, &gid), -1);
	EQ(ibv_query_gid(ctx, port_num, -1, &gid), -1);
	EQ(ibv_query_gid(ctx, 2, 0, &gid), -1);
}

static void query_gid_ex(void)
{
	struct ibv_gid_entry e, table[4];

	OK(ibv_query_gid_ex(ctx, port_num, (uint32_t)gid_index, &e, 0));
	EQ(memcmp(&e.gid, &own_gid, 16), 0);
	EQ(e.gid_index, gid_index);
	EQ(e.port_num, port_num);
	EQ(e.gid_type, IBV_GID_TYPE_ROCE_V2);
	CHECK(ibv_query_gid_ex(ctx, port_num, (uint32_t)port_attr.gid_tbl_len, &e, 0) != 0, "an index beyond the table was answered");
	int rc = ibv_query_gid_ex(ctx, port_num, (uint32_t)gid_index, &e, 1); /* no flag has a meaning yet */
	CHECK(rc == EOPNOTSUPP || rc == EINVAL, "got %d", rc);
	ssize_t n = ibv_query_gid_table(ctx, table, COUNT(table), 0);
	CHECK(n > gid_index && n <= (ssize_t)COUNT(table), "got %zd", n);
	EQ(memcmp(&table[gid_index].gid, &own_gid, 16), 0);
}

static void query_pkey(void)
{
	__be16 pkey = 0;

	EQ(ibv_query_pkey(ctx, port_num, 0, &pkey), 0);
	EQ(pkey, 0xffff);
	EQ(ibv_get_pkey_index(ctx, port_num, pkey), 0);
	EQ(ibv_query_pkey(ctx, port_num, port_attr.pkey_tbl_len, &pkey), -1);
	EQ(ibv_get_pkey_index(ctx, port_num, 0x1234), -1);
}

static void async_fd(void)
{
	struct pollfd p = { .fd = ctx->async_fd, .events = POLLIN };
	int flags = fcntl(ctx->async_fd, F_GETFL);

	CHECK(flags >= 0, "async_fd %d is not open", ctx->async_fd);
	EQ(poll(&p, 1, 0), 0);
	EQ(fcntl(ctx->async_fd, F_SETFL, flags | O_NONBLOCK), 0);
	struct ibv_async_event event;
	errno = 0;
	EQ(ibv_get_async_event(ctx, &event), -1);
	EQ(errno, EAGAIN);
	EQ(fcntl(ctx->async_fd, F_SETFL, flags), 0);
}

/* ---- limits: up to the stated value it works, beyond it is refused ------------------------------------------------ */

struct things {
	struct ibv_pd *pd;
	struct ibv_cq *cq;
};

static struct things things(void)
{
	struct things t = { MADE(ibv_alloc_pd(ctx)), NULL };

	t.cq = MADE(ibv_create_cq(ctx, 64, NULL, NULL, 0));
	return t;
}

static void give_back(struct things t)
{
	OK(ibv_destroy_cq(t.cq));
	OK(ibv_dealloc_pd(t.pd));
}

static struct ibv_qp_init_attr small_qp(struct things t)
{
	struct end_cfg c = { .send_wr = 4, .recv_wr = 4 };

	return qp_init_attr(&c, t.cq, t.cq);
}

static void cq_limits(void)
{
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, dev_attr.max_cqe, NULL, NULL, 0));

	CHECK(cq->cqe >= dev_attr.max_cqe, "got %d", cq->cqe);
	OK(ibv_destroy_cq(cq));
	NOT_MADE(ibv_create_cq(ctx, dev_attr.max_cqe + 1, NULL, NULL, 0), EINVAL);
	NOT_MADE(ibv_create_cq(ctx, 0, NULL, NULL, 0), EINVAL);
	NOT_MADE(ibv_create_cq(ctx, -1, NULL, NULL, 0), EINVAL);
	CHECK(ctx->num_comp_vectors >= 1, "got %d", ctx->num_comp_vectors);
	cq = MADE(ibv_create_cq(ctx, 1, NULL, NULL, ctx->num_comp_vectors - 1));
	CHECK(cq->cqe >= 1, "got %d", cq->cqe);
	OK(ibv_destroy_cq(cq));
	NOT_MADE(ibv_create_cq(ctx, 1, NULL, NULL, ctx->num_comp_vectors), EINVAL);
	NOT_MADE(ibv_create_cq(ctx, 1, NULL, NULL, -1), EINVAL);
}

static void qp_wr_limits(void)
{
	struct things t = things();
	struct ibv_qp_init_attr a = small_qp(t);

	/* The stated maximum may need more memory than is sensible to ask for here: a few thousand must work. */
	a.cap.max_send_wr = a.cap.max_recv_wr = (uint32_t)(dev_attr.max_qp_wr < 8192 ? dev_attr.max_qp_wr : 8192);
	uint32_t asked = a.cap.max_send_wr;
	struct ibv_qp *qp = MADE(ibv_create_qp(t.pd, &a));
	CHECK(a.cap.max_send_wr >= asked && a.cap.max_recv_wr >= asked, "got %u %u", a.cap.max_send_wr, a.cap.max_recv_wr);
	OK(ibv_destroy_qp(qp));
	a = small_qp(t);
	a.cap.max_send_wr = (uint32_t)dev_attr.max_qp_wr + 1;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	a = small_qp(t);
	a.cap.max_recv_wr = (uint32_t)dev_attr.max_qp_wr + 1;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	a = small_qp(t);
	a.cap.max_send_wr = a.cap.max_recv_wr = UINT32_MAX;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	give_back(t);
}

static void qp_sge_limits(void)
{
	struct things t = things();
	struct ibv_qp_init_attr a = small_qp(t);

	a.cap.max_send_sge = a.cap.max_recv_sge = (uint32_t)dev_attr.max_sge;
	struct ibv_qp *qp = MADE(ibv_create_qp(t.pd, &a));
	CHECK(a.cap.max_send_sge >= (uint32_t)dev_attr.max_sge, "got %u", a.cap.max_send_sge);
	CHECK(a.cap.max_recv_sge >= (uint32_t)dev_attr.max_sge, "got %u", a.cap.max_recv_sge);
	OK(ibv_destroy_qp(qp));
	a = small_qp(t);
	a.cap.max_send_sge = (uint32_t)dev_attr.max_sge + 1;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	a = small_qp(t);
	a.cap.max_recv_sge = (uint32_t)dev_attr.max_sge + 1;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	a = small_qp(t);
	a.cap.max_inline_data = 1 << 30;
	NOT_MADE(ibv_create_qp(t.pd, &a), EINVAL);
	give_back(t);
}

/* The values written back are what the QP has: at least what was asked, and what query_qp says. */
static void qp_caps_returned(void)
{
	struct things t = things();
	struct ibv_qp_init_attr a = small_qp(t), init;
	struct ibv_qp_attr attr;

	a.cap = (struct ibv_qp_cap){ .max_send_wr = 7, .max_recv_wr = 9, .max_send_sge = 3, .max_recv_sge = 5, .max_inline_data = 33 };
	struct ibv_qp *qp = MADE(ibv_create_qp(t.pd, &a));
	CHECK(a.cap.max_send_wr >= 7 && a.cap.max_recv_wr >= 9, "got %u %u", a.cap.max_send_wr, a.cap.max_recv_wr);
	CHECK(a.cap.max_send_sge >= 3 && a.cap.max_recv_sge >= 5, "got %u %u", a.cap.max_send_sge, a.cap.max_recv_sge);
	CHECK(a.cap.max_inline_data >= 33, "got %u", a.cap.max_inline_data);
	OK(ibv_query_qp(qp, &attr, IBV_QP_CAP, &init));
	EQ(memcmp(&init.cap, &attr.cap, sizeof(attr.cap)), 0);
	if (!is_rxe) /* which tells the creator what was asked for, and the query what there is */
		EQ(memcmp(&attr.cap, &a.cap, sizeof(a.cap)), 0);
	CHECK(init.send_cq == t.cq && init.recv_cq == t.cq && !init.srq, "the QP's CQs are others");
	EQ(init.qp_type, IBV_QPT_RC);
	EQ(init.sq_sig_all, 1);
	OK(ibv_destroy_qp(qp));
	give_back(t);
}

static void many_qps_and_cqs(void)
{
	enum { N = 256 };
	static struct ibv_qp *qp[N];
	static struct ibv_cq *cq[N];
	struct things t = things();

	for (int i = 0; i < N; i++) {
		cq[i] = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
		struct ibv_qp_init_attr a = small_qp((struct things){ t.pd, cq[i] });
		qp[i] = MADE(ibv_create_qp(t.pd, &a));
		CHECK(qp[i]->qp_num && qp[i]->qp_num < 1 << 24, "got 0x%x", qp[i]->qp_num);
		for (int k = 0; k < i; k++)
			CHECK(qp[k]->qp_num != qp[i]->qp_num, "QPN 0x%x twice", qp[i]->qp_num);
	}
	for (int i = 0; i < N; i++) {
		OK(ibv_destroy_qp(qp[i]));
		OK(ibv_destroy_cq(cq[i]));
	}
	give_back(t);
}

#define CASE(name) { #name, name, LOCAL }
static const struct test_case cases[] = {
	CASE(device_list), CASE(open_twice), CASE(names_for_enums), CASE(rates), CASE(query_device), CASE(query_device_ex), CASE(query_port),
	CASE(query_gid), CASE(query_gid_ex), CASE(query_pkey), CASE(async_fd), CASE(cq_limits), CASE(qp_wr_limits), CASE(qp_sge_limits),
	CASE(qp_caps_returned), CASE(many_qps_and_cqs),
};
SUITE(cases)
