/* Two RC QPs of one process, connected to each other. */
#ifndef PAIR_H
#define PAIR_H
#include "check.h"

enum { SIZE = 4096 };

struct pair {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;    /* of both send queues */
	struct ibv_cq *rcq;   /* of both receive queues, with the channel */
	struct ibv_qp *qp[2]; /* 0 sends */
	struct ibv_mr *mr;
	char *buffer; /* first half: source, second half: destination */
};

static inline void connect_to(struct ibv_qp *qp, uint32_t peer)
{
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1,
				 .qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
						    IBV_ACCESS_REMOTE_ATOMIC };
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PORT | IBV_QP_PKEY_INDEX | IBV_QP_ACCESS_FLAGS) == 0);
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = IBV_MTU_4096, .dest_qp_num = peer,
				  .max_dest_rd_atomic = 4, .min_rnr_timer = 12,
				  .ah_attr = { .is_global = 1, .port_num = 1, .grh.hop_limit = 64 } };
	CHECK(ibv_query_gid(qp->context, 1, 0, &a.ah_attr.grh.dgid) == 0);
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
					    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER) == 0);
	a = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 7, .rnr_retry = 7,
				  .max_rd_atomic = 4 };
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
					    IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC) == 0);
}

/* `send_ops` 0: plain QPs. `cq`: a CQ to use for sends, or NULL to make one. */
static inline struct pair make_pair(uint64_t send_ops, struct ibv_context *context, struct ibv_cq *cq)
{
	struct pair p = { .context = context, .cq = cq };
	CHECK((p.pd = ibv_alloc_pd(p.context)));
	CHECK((p.channel = ibv_create_comp_channel(p.context)));
	if (!p.cq)
		CHECK((p.cq = ibv_create_cq(p.context, 64, NULL, NULL, 0)));
	CHECK((p.rcq = ibv_create_cq(p.context, 64, &p, p.channel, 0)));
	CHECK((p.buffer = aligned_alloc(4096, 2 * SIZE)));
	memset(p.buffer, 0, 2 * SIZE);
	CHECK((p.mr = ibv_reg_mr(p.pd, p.buffer, 2 * SIZE,
				 IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
					 IBV_ACCESS_REMOTE_ATOMIC)));
	for (int i = 0; i < 2; i++) {
		struct ibv_qp_init_attr_ex init = { .send_cq = p.cq, .recv_cq = p.rcq, .qp_type = IBV_QPT_RC,
						    .cap = { 16, 16, 4, 4, 64 }, .pd = p.pd,
						    .comp_mask = IBV_QP_INIT_ATTR_PD, .send_ops_flags = send_ops };
		if (send_ops)
			init.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
		CHECK((p.qp[i] = ibv_create_qp_ex(p.context, &init)));
	}
	connect_to(p.qp[0], p.qp[1]->qp_num);
	connect_to(p.qp[1], p.qp[0]->qp_num);
	return p;
}

static inline void free_pair(struct pair *p)
{
	CHECK(ibv_destroy_qp(p->qp[0]) == 0 && ibv_destroy_qp(p->qp[1]) == 0);
	CHECK(ibv_destroy_cq(p->cq) == 0 && ibv_destroy_cq(p->rcq) == 0);
	CHECK(ibv_destroy_comp_channel(p->channel) == 0);
	CHECK(ibv_dereg_mr(p->mr) == 0 && ibv_dealloc_pd(p->pd) == 0);
	free(p->buffer);
}

static inline void post_receive(struct pair *p, uint64_t wr_id, uint32_t offset, uint32_t length)
{
	struct ibv_sge sge = { (uintptr_t)p->buffer + SIZE + offset, length, p->mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = wr_id, .sg_list = &sge, .num_sge = 1 }, *bad = NULL;
	CHECK(ibv_post_recv(p->qp[1], &wr, &bad) == 0);
}

/* Spins until a completion is there. */
static inline struct ibv_wc one(struct ibv_cq *cq)
{
	struct ibv_wc wc;
	int n;
	while ((n = ibv_poll_cq(cq, 1, &wc)) == 0)
		;
	CHECK(n == 1);
	return wc;
}

static inline void expect(struct ibv_cq *cq, uint64_t wr_id, enum ibv_wc_opcode opcode)
{
	struct ibv_wc wc = one(cq);
	if (wc.status != IBV_WC_SUCCESS)
		fprintf(stderr, "wr %lu: %s\n", wc.wr_id, ibv_wc_status_str(wc.status));
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == wr_id && wc.opcode == opcode);
}
#endif
