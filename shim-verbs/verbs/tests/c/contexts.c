/* Two contexts of one process, one small region each: atomics and writes reach the other, and two PDs can not both move
 * one page, which registration says for atomics and the router makes up for with the rest. */
#include "pair.h"

struct side {
	struct ibv_context *context;
	struct ibv_pd *pd;
	struct ibv_cq *cq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	char *memory;
};

static struct side make(char *memory)
{
	struct side s = { .context = open_first(), .memory = memory };
	CHECK((s.pd = ibv_alloc_pd(s.context)) && (s.cq = ibv_create_cq(s.context, 8, NULL, NULL, 0)));
	CHECK((s.mr = ibv_reg_mr(s.pd, memory, 1000, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_ATOMIC |
						     IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ)));
	struct ibv_qp_init_attr init = { .send_cq = s.cq, .recv_cq = s.cq, .qp_type = IBV_QPT_RC,
					 .cap = { 4, 4, 1, 1, 0 } };
	CHECK((s.qp = ibv_create_qp(s.pd, &init)));
	return s;
}

static void write_one(struct side *from, struct side *to, enum ibv_wr_opcode opcode, enum ibv_wc_opcode done)
{
	struct ibv_sge sge = { (uintptr_t)from->memory + 8, 8, from->mr->lkey };
	struct ibv_send_wr wr = { .wr_id = 1, .sg_list = &sge, .num_sge = 1, .opcode = opcode,
				  .send_flags = IBV_SEND_SIGNALED }, *bad;
	if (opcode == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = (uintptr_t)to->memory;
		wr.wr.atomic.rkey = to->mr->rkey;
		wr.wr.atomic.compare_add = 5;
	} else {
		wr.wr.rdma.remote_addr = (uintptr_t)to->memory + 16;
		wr.wr.rdma.rkey = to->mr->rkey;
	}
	CHECK(ibv_post_send(from->qp, &wr, &bad) == 0);
	expect(from->cq, 1, done);
}

int main(void)
{
	char *pages = aligned_alloc(4096, 3 * 4096);
	memset(pages, 0, 3 * 4096);
	struct side a = make(pages + 64), b = make(pages + 2 * 4096 + 128);
	/* b's PD has the page already: a's can not move it, and says so where that matters */
	CHECK_NULL(ibv_reg_mr(a.pd, b.memory + 2048, 64, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_ATOMIC),
		   EOPNOTSUPP);
	connect_to(a.qp, b.qp->qp_num);
	connect_to(b.qp, a.qp->qp_num);
	struct side *from = &a, *to = &b;
	for (int way = 0; way < 2; way++) {
		uint64_t *source = (uint64_t *)from->memory, *target = (uint64_t *)to->memory;
		target[0] = 100;
		source[1] = 0;
		write_one(from, to, IBV_WR_ATOMIC_FETCH_AND_ADD, IBV_WC_FETCH_ADD);
		CHECK(target[0] == 105 && source[1] == 100);
		source[1] = 4711;
		write_one(from, to, IBV_WR_RDMA_WRITE, IBV_WC_RDMA_WRITE);
		CHECK(target[2] == 4711);
		source[1] = 0;
		write_one(from, to, IBV_WR_RDMA_READ, IBV_WC_RDMA_READ);
		CHECK(source[1] == 4711);
		from = &b;
		to = &a;
	}
	for (int i = 0; i < 2; i++) {
		struct side *s = i ? &b : &a;
		CHECK(ibv_destroy_qp(s->qp) == 0 && ibv_destroy_cq(s->cq) == 0);
		CHECK(ibv_dereg_mr(s->mr) == 0 && ibv_dealloc_pd(s->pd) == 0 && ibv_close_device(s->context) == 0);
	}
	free(pages);
	return 0;
}
