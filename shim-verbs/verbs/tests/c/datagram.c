/* UD: a datagram arrives with its sender's address, and a reply made from it arrives back. */
#include "check.h"

enum { GRH = 40, QKEY = 0x11111111 };

static struct ibv_wc one(struct ibv_cq *cq)
{
	struct ibv_wc wc;
	int n;
	while ((n = ibv_poll_cq(cq, 1, &wc)) == 0)
		;
	CHECK(n == 1 && wc.status == IBV_WC_SUCCESS);
	return wc;
}

static struct ibv_qp *make_qp(struct ibv_pd *pd, struct ibv_cq *cq)
{
	struct ibv_qp_init_attr init = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_UD, .cap = { 4, 4, 1, 1, 64 } };
	struct ibv_qp *qp = ibv_create_qp(pd, &init);
	CHECK(qp && qp->qp_type == IBV_QPT_UD);
	struct ibv_qp_attr a = { .qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY };
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PORT | IBV_QP_PKEY_INDEX | IBV_QP_QKEY) == 0);
	a.qp_state = IBV_QPS_RTR;
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE) == 0);
	a.qp_state = IBV_QPS_RTS;
	CHECK(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN) == 0);
	return qp;
}

static int send_to(struct ibv_qp *qp, struct ibv_ah *ah, uint32_t qpn, struct ibv_mr *mr, size_t offset)
{
	struct ibv_sge sge = { (uintptr_t)mr->addr + offset, 32, mr->lkey };
	struct ibv_send_wr wr = { .wr_id = 1, .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED, .wr.ud = { ah, qpn, QKEY } }, *bad = NULL;
	int ret = ibv_post_send(qp, &wr, &bad);
	CHECK(ret == 0 || bad == &wr);
	return ret;
}

static void receive(struct ibv_qp *qp, struct ibv_mr *mr, size_t offset)
{
	struct ibv_sge sge = { (uintptr_t)mr->addr + offset, GRH + 32, mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = 2, .sg_list = &sge, .num_sge = 1 }, *bad;
	CHECK(ibv_post_recv(qp, &wr, &bad) == 0);
}

int main(void)
{
	struct ibv_context *context = open_first();
	struct ibv_pd *pd = ibv_alloc_pd(context);
	struct ibv_cq *cqs[2];
	struct ibv_qp *qps[2];
	char *buffer = aligned_alloc(4096, 4096);
	memset(buffer, 0, 4096);
	CHECK(pd);
	struct ibv_mr *mr = ibv_reg_mr(pd, buffer, 4096, IBV_ACCESS_LOCAL_WRITE);
	CHECK(mr);
	for (int i = 0; i < 2; i++) {
		CHECK((cqs[i] = ibv_create_cq(context, 8, NULL, NULL, 0)));
		qps[i] = make_qp(pd, cqs[i]);
	}
	struct ibv_ah_attr attr = { .is_global = 1, .port_num = 1, .grh = { .hop_limit = 7, .traffic_class = 0x20 } };
	CHECK(ibv_query_gid(context, 1, 0, &attr.grh.dgid) == 0);
	struct ibv_ah *ah = ibv_create_ah(pd, &attr);
	CHECK(ah && send_to(qps[0], NULL, qps[1]->qp_num, mr, 0) == EINVAL);

	strcpy(buffer, "there");
	receive(qps[1], mr, 1024);
	CHECK(send_to(qps[0], ah, qps[1]->qp_num, mr, 0) == 0);
	struct ibv_wc wc = one(cqs[1]);
	CHECK(wc.wr_id == 2 && wc.byte_len == GRH + 32 && (wc.wc_flags & IBV_WC_GRH));
	CHECK(wc.src_qp == qps[0]->qp_num && wc.qp_num == qps[1]->qp_num && !strcmp(buffer + 1024 + GRH, "there"));
	CHECK(one(cqs[0]).opcode == IBV_WC_SEND);

	struct ibv_grh *grh = (struct ibv_grh *)(buffer + 1024);
	struct ibv_ah_attr back;
	memset(&back, 0xff, sizeof back);
	CHECK(ibv_init_ah_from_wc(context, 1, &wc, grh, &back) == 0);
	CHECK(back.is_global == 1 && back.port_num == 1 && back.grh.sgid_index == 0);
	CHECK(!memcmp(&back.grh.dgid, &attr.grh.dgid, 16));
	CHECK(back.grh.hop_limit == 7 && back.grh.traffic_class == 0x20);
	struct ibv_ah *reply = ibv_create_ah_from_wc(pd, &wc, grh, 1);
	CHECK(reply);
	strcpy(buffer, "and back");
	receive(qps[0], mr, 2048);
	CHECK(send_to(qps[1], reply, wc.src_qp, mr, 0) == 0);
	CHECK(one(cqs[0]).src_qp == qps[1]->qp_num && !strcmp(buffer + 2048 + GRH, "and back"));

	/* a header that was not sent to us names nobody */
	memset(grh, 0, sizeof *grh);
	CHECK(ibv_init_ah_from_wc(context, 1, &wc, grh, &back) == -1);
	CHECK_NULL(ibv_create_ah_from_wc(pd, &wc, grh, 1), EPROTONOSUPPORT);

	CHECK(ibv_destroy_ah(ah) == 0 && ibv_destroy_ah(reply) == 0);
	for (int i = 0; i < 2; i++)
		CHECK(ibv_destroy_qp(qps[i]) == 0 && ibv_destroy_cq(cqs[i]) == 0);
	CHECK(ibv_dereg_mr(mr) == 0 && ibv_dealloc_pd(pd) == 0 && ibv_close_device(context) == 0);
	free(buffer);
	return 0;
}
