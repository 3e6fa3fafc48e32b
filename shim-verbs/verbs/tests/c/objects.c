/* What libibverbs itself promises about objects: their fields, their limits, who is busy, and what is refused how. */
#include "check.h"
#include <fcntl.h>
#include <poll.h>

static void device(struct ibv_context *context)
{
	CHECK(!strcmp(ibv_get_device_name(context->device), "ff0"));
	CHECK(ibv_get_device_guid(context->device) != 0);
	CHECK(context->device->node_type == IBV_NODE_CA);
	CHECK(context->num_comp_vectors >= 1);
	/* provider libraries look behind the device */
	for (size_t i = sizeof(struct ibv_device); i < 1024; i++)
		CHECK(((char *)context->device)[i] == 0);
}

static void queries(struct ibv_context *context)
{
	struct ibv_device_attr attr;
	CHECK(ibv_query_device(context, &attr) == 0);
	CHECK(attr.vendor_id && attr.vendor_id != 0x02c9 && attr.vendor_id != 0x15b3);
	CHECK(attr.node_guid == ibv_get_device_guid(context->device));
	CHECK(attr.max_qp > 0 && attr.max_cqe > 0 && attr.max_sge >= 16 && attr.max_pkeys > 0);
	CHECK(attr.phys_port_cnt == 1 && attr.max_srq > 0 && attr.max_srq_wr > 0 && attr.max_srq_sge >= 16 && attr.max_mw == attr.max_mr);
	struct ibv_device_attr_ex ex;
	memset(&ex, 0xff, sizeof ex);
	CHECK(ibv_query_device_ex(context, NULL, &ex) == 0);
	CHECK(ex.phys_port_cnt_ex == 1 && ex.max_dm_size > 0 && ex.odp_caps.general_caps & IBV_ODP_SUPPORT);
	CHECK(ex.tso_caps.max_tso == 0 && ex.rss_caps.supported_qpts == 0 && ex.raw_packet_caps == 0);
	CHECK(ex.orig_attr.node_guid == attr.node_guid && ex.orig_attr.max_qp == attr.max_qp);
	CHECK(ex.orig_attr.max_mr_size == attr.max_mr_size && ex.orig_attr.vendor_id == attr.vendor_id);

	struct ibv_port_attr port;
	memset(&port, 0xff, sizeof port);
	CHECK(ibv_query_port(context, 1, &port) == 0);
	CHECK(port.state == IBV_PORT_ACTIVE && port.link_layer == IBV_LINK_LAYER_ETHERNET && port.gid_tbl_len == 3);
	CHECK(port.port_cap_flags2 == 0);
	CHECK(ibv_query_port(context, 2, &port) == EINVAL);
	/* the function, as old programs call it, writes 48 bytes */
	unsigned char old[56];
	memset(old, 0xee, sizeof old);
	CHECK((ibv_query_port)(context, 1, (struct _compat_ibv_port_attr *)old) == 0);
	for (int i = 48; i < 56; i++)
		CHECK(old[i] == 0xee);

	union ibv_gid gid;
	struct ibv_gid_entry entry, table[2];
	CHECK(ibv_query_gid(context, 1, 0, &gid) == 0);
	CHECK(ibv_query_gid(context, 1, 3, &gid) == -1);
	CHECK(ibv_query_gid_ex(context, 1, 0, &entry, 0) == 0);
	CHECK(entry.gid_type == IBV_GID_TYPE_ROCE_V2 && !memcmp(&entry.gid, &gid, 16));
	CHECK(ibv_query_gid_table(context, table, 2, 0) == 2);
	CHECK(ibv_query_gid_table(context, table, 0, 0) == -EINVAL);
	CHECK(ibv_query_gid_table(context, table, 2, 1) == -EINVAL);
	__be16 pkey;
	CHECK(ibv_query_pkey(context, 1, 0, &pkey) == 0 && pkey == 0xffff);
	CHECK(ibv_query_pkey(context, 1, 1, &pkey) == -1);
	CHECK(ibv_get_pkey_index(context, 1, pkey) == 0);
}

static void async(struct ibv_context *context)
{
	struct pollfd p = { .fd = context->async_fd, .events = POLLIN };
	CHECK(poll(&p, 1, 0) == 0);
	int flags = fcntl(context->async_fd, F_GETFL);
	CHECK(fcntl(context->async_fd, F_SETFL, flags | O_NONBLOCK) == 0);
	struct ibv_async_event event;
	errno = 0;
	CHECK(ibv_get_async_event(context, &event) == -1 && errno == EAGAIN);
}

static void busy(struct ibv_context *context)
{
	static char buffer[8192];
	struct ibv_pd *pd = ibv_alloc_pd(context);
	CHECK(pd && pd->context == context);
	struct ibv_mr *mr = ibv_reg_mr(pd, buffer, sizeof buffer, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
	CHECK(mr && mr->context == context && mr->pd == pd && mr->addr == buffer && mr->length == sizeof buffer);
	CHECK(mr->lkey && mr->rkey);
	CHECK(ibv_dealloc_pd(pd) == EBUSY);
	CHECK(ibv_dereg_mr(mr) == 0);
	/* remote rights need the local one; optional bits are optional */
	CHECK_NULL(ibv_reg_mr(pd, buffer, 64, IBV_ACCESS_REMOTE_WRITE), EINVAL);
	mr = ibv_reg_mr(pd, buffer, 64, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING);
	CHECK(mr && ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, pd, NULL, 0, 0) == 0 && ibv_dereg_mr(mr) == 0);

	struct ibv_comp_channel *channel = ibv_create_comp_channel(context);
	CHECK(channel && channel->context == context && channel->fd >= 0 && channel->refcnt == 0);
	struct ibv_cq *cq = ibv_create_cq(context, 10, &buffer, channel, 0);
	CHECK(cq && cq->context == context && cq->channel == channel && cq->cq_context == &buffer && cq->cqe >= 10);
	CHECK(channel->refcnt == 1 && ibv_destroy_comp_channel(channel) == EBUSY);
	struct ibv_device_attr attr;
	CHECK(ibv_query_device(context, &attr) == 0);
	CHECK_NULL(ibv_create_cq(context, attr.max_cqe + 1, NULL, NULL, 0), EINVAL);
	CHECK_NULL(ibv_create_cq(context, 10, NULL, NULL, context->num_comp_vectors), EINVAL);
	CHECK_NULL(ibv_create_cq(context, 0, NULL, NULL, 0), EINVAL);

	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .qp_context = &init,
					 .cap = { .max_send_wr = 4, .max_recv_wr = 4, .max_send_sge = 2,
						  .max_recv_sge = 2, .max_inline_data = 16 } };
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	CHECK(qp && qp->context == context && qp->pd == pd && qp->send_cq == cq && qp->recv_cq == cq && !qp->srq);
	CHECK(qp->qp_context == &init && qp->qp_type == IBV_QPT_RC && qp->state == IBV_QPS_RESET && qp->qp_num);
	CHECK(init.cap.max_send_wr >= 4 && init.cap.max_inline_data >= 16);
	CHECK(ibv_qp_to_qp_ex(qp) == NULL);
	CHECK(ibv_destroy_cq(cq) == EBUSY && ibv_dealloc_pd(pd) == EBUSY);

	struct ibv_qp_attr a = { .qp_state = IBV_QPS_RTS };
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE) == EINVAL && qp->state == IBV_QPS_RESET);
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_READ };
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PORT) == EINVAL);
	CHECK(ibv_modify_qp(qp, &a, 1 << 30) == EINVAL);
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PORT | IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS) == 0);
	CHECK(qp->state == IBV_QPS_INIT);
	struct ibv_qp_init_attr init2;
	CHECK(ibv_query_qp(qp, &a, IBV_QP_STATE, &init2) == 0 && a.qp_state == IBV_QPS_INIT && a.port_num == 1);
	CHECK(a.qp_access_flags == IBV_ACCESS_REMOTE_READ);
	CHECK(init2.send_cq == cq && init2.qp_type == IBV_QPT_RC && init2.cap.max_send_sge == init.cap.max_send_sge);
	CHECK(ibv_destroy_qp(qp) == 0 && ibv_destroy_cq(cq) == 0);
	CHECK(channel->refcnt == 0 && ibv_destroy_comp_channel(channel) == 0);

	struct ibv_ah_attr ah_attr = { .port_num = 1 };
	CHECK_NULL(ibv_create_ah(pd, &ah_attr), EINVAL);
	ah_attr.is_global = 1;
	CHECK(ibv_query_gid(context, 1, 0, &ah_attr.grh.dgid) == 0);
	struct ibv_ah *ah = ibv_create_ah(pd, &ah_attr);
	CHECK(ah && ah->context == context && ah->pd == pd);
	CHECK(ibv_dealloc_pd(pd) == EBUSY && ibv_destroy_ah(ah) == 0);

	struct ibv_srq_init_attr srq_attr = { .attr = { .max_wr = 1, .max_sge = 1 } };
	struct ibv_srq *srq = ibv_create_srq(pd, &srq_attr);
	CHECK(srq && srq->context == context && srq->pd == pd);
	CHECK(ibv_dealloc_pd(pd) == EBUSY && ibv_destroy_srq(srq) == 0 && ibv_dealloc_pd(pd) == 0);
}

static void unbuilt(struct ibv_context *context)
{
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_cq *cq = ibv_create_cq(context, 10, NULL, NULL, 0);
	CHECK(pd && cq);
	CHECK_NULL(ibv_reg_dmabuf_mr(pd, 0, 64, 0, 0, 0), EOPNOTSUPP);
	struct ibv_cq_init_attr_ex cq_attr = { .cqe = 10, .wc_flags = IBV_WC_EX_WITH_CVLAN };
	CHECK_NULL(ibv_create_cq_ex(context, &cq_attr), EOPNOTSUPP);
	struct ibv_qp_init_attr_ex qp_attr = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .pd = pd,
					       .cap = { 1, 1, 1, 1, 0 },
					       .comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
					       .send_ops_flags = IBV_QP_EX_WITH_TSO };
	CHECK_NULL(ibv_create_qp_ex(context, &qp_attr), EOPNOTSUPP);
	qp_attr.qp_type = IBV_QPT_RAW_PACKET;
	qp_attr.send_ops_flags = 0;
	CHECK_NULL(ibv_create_qp_ex(context, &qp_attr), EOPNOTSUPP);
	CHECK(ibv_destroy_cq(cq) == 0 && ibv_dealloc_pd(pd) == 0);
}

int main(void)
{
	struct ibv_context *context = open_first();
	device(context);
	queries(context);
	async(context);
	busy(context);
	unbuilt(context);
	CHECK(ibv_close_device(context) == 0);
	return 0;
}
