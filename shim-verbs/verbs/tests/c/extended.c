/* ibv_wr_* and ibv_start_poll: nothing is posted before complete, abort drops, errors are told by complete. */
#include "pair.h"

#define OPS                                                                                                  \
	(IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_WRITE |                    \
	 IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP | \
	 IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD)

/* The next completion of an extended CQ, which stays current until ibv_end_poll. */
static void next(struct ibv_cq_ex *cq, uint64_t wr_id, enum ibv_wc_opcode opcode)
{
	struct ibv_poll_cq_attr attr = {};
	int ret;
	while ((ret = ibv_start_poll(cq, &attr)) == ENOENT)
		;
	CHECK(ret == 0 && cq->status == IBV_WC_SUCCESS && cq->wr_id == wr_id && ibv_wc_read_opcode(cq) == opcode);
}

static void done(struct ibv_cq_ex *cq, uint64_t wr_id, enum ibv_wc_opcode opcode)
{
	next(cq, wr_id, opcode);
	CHECK(ibv_next_poll(cq) == ENOENT);
	ibv_end_poll(cq);
}

/* The same, where more may be waiting. */
static void done_or_more(struct ibv_cq_ex *cq, uint64_t wr_id)
{
	next(cq, wr_id, IBV_WC_RDMA_WRITE);
	ibv_end_poll(cq);
}

static void begin(struct ibv_qp_ex *qp, uint64_t wr_id)
{
	qp->wr_id = wr_id;
	qp->wr_flags = IBV_SEND_SIGNALED;
}

static void batches(struct pair *p, struct ibv_qp_ex *qp, struct ibv_cq_ex *cq)
{
	uint64_t from = (uintptr_t)p->buffer, to = from + SIZE;
	struct ibv_poll_cq_attr attr = {};

	/* two requests in one go; inline data may be reused before complete */
	char text[8] = "inline";
	post_receive(p, 10, 0, 64);
	post_receive(p, 11, 64, 64);
	ibv_wr_start(qp);
	begin(qp, 1);
	ibv_wr_send(qp);
	ibv_wr_set_inline_data(qp, text, sizeof text);
	memset(text, 'x', sizeof text);
	begin(qp, 2);
	ibv_wr_send_imm(qp, htobe32(77));
	struct ibv_data_buf list[2] = { { "ab", 2 }, { "cd", 3 } };
	ibv_wr_set_inline_data_list(qp, 2, list);
	struct ibv_wc wc;
	CHECK(ibv_start_poll(cq, &attr) == ENOENT && ibv_poll_cq(p->rcq, 1, &wc) == 0);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(p->rcq, 10, IBV_WC_RECV);
	wc = one(p->rcq);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 11 && (wc.wc_flags & IBV_WC_WITH_IMM));
	CHECK(wc.imm_data == htobe32(77) && wc.byte_len == 5 && wc.qp_num == p->qp[1]->qp_num);
	CHECK(!strcmp(p->buffer + SIZE, "inline") && !memcmp(p->buffer + SIZE + 64, "abcd", 5));
	next(cq, 1, IBV_WC_SEND);
	CHECK(ibv_wc_read_qp_num(cq) == p->qp[0]->qp_num && ibv_wc_read_wc_flags(cq) == 0);
	int ret;
	while ((ret = ibv_next_poll(cq)) == ENOENT)
		;
	CHECK(ret == 0 && cq->wr_id == 2 && cq->status == IBV_WC_SUCCESS);
	ibv_end_poll(cq);

	/* abort: nothing happens, and the next batch starts afresh */
	strcpy(p->buffer, "dropped");
	ibv_wr_start(qp);
	begin(qp, 3);
	ibv_wr_rdma_write(qp, p->mr->rkey, to);
	ibv_wr_set_sge(qp, p->mr->lkey, from, 8);
	ibv_wr_abort(qp);
	strcpy(p->buffer, "written");
	ibv_wr_start(qp);
	begin(qp, 4);
	ibv_wr_rdma_write(qp, p->mr->rkey, to);
	struct ibv_sge sges[2] = { { from, 4, p->mr->lkey }, { from + 4, 4, p->mr->lkey } };
	ibv_wr_set_sge_list(qp, 2, sges);
	CHECK(ibv_wr_complete(qp) == 0);
	done(cq, 4, IBV_WC_RDMA_WRITE);
	CHECK(!strcmp(p->buffer + SIZE, "written"));

	ibv_wr_start(qp);
	begin(qp, 5);
	ibv_wr_rdma_read(qp, p->mr->rkey, to);
	ibv_wr_set_sge(qp, p->mr->lkey, from + 1024, 8);
	CHECK(ibv_wr_complete(qp) == 0);
	done(cq, 5, IBV_WC_RDMA_READ);
	CHECK(!strcmp(p->buffer + 1024, "written"));

	*(uint64_t *)(p->buffer + SIZE) = 40;
	ibv_wr_start(qp);
	begin(qp, 6);
	ibv_wr_atomic_fetch_add(qp, p->mr->rkey, to, 2);
	ibv_wr_set_sge(qp, p->mr->lkey, from, 8);
	CHECK(ibv_wr_complete(qp) == 0);
	done(cq, 6, IBV_WC_FETCH_ADD);
	ibv_wr_start(qp);
	begin(qp, 7);
	ibv_wr_atomic_cmp_swp(qp, p->mr->rkey, to, 42, 7);
	ibv_wr_set_sge(qp, p->mr->lkey, from + 8, 8);
	CHECK(ibv_wr_complete(qp) == 0);
	done(cq, 7, IBV_WC_COMP_SWAP);
	CHECK(((uint64_t *)p->buffer)[0] == 40 && ((uint64_t *)p->buffer)[1] == 42);
	CHECK(*(uint64_t *)(p->buffer + SIZE) == 7);
}

/* A batch with an error posts nothing, not even what was right in it. */
static void errors(struct pair *p, struct ibv_qp_ex *qp, struct ibv_cq_ex *cq)
{
	uint64_t from = (uintptr_t)p->buffer, to = from + SIZE;
	struct ibv_wc wc;
	memset(p->buffer + SIZE, 0, 8);
	for (int wrong = 0; wrong < 6; wrong++) {
		strcpy(p->buffer, "batch");
		ibv_wr_start(qp);
		begin(qp, 8);
		ibv_wr_rdma_write(qp, p->mr->rkey, to);
		ibv_wr_set_sge(qp, p->mr->lkey, from, 6);
		begin(qp, 9);
		char big[4096];
		struct ibv_sge many[32] = {};
		switch (wrong) {
		case 0: ibv_wr_send_inv(qp, 1); break;
		case 1: ibv_wr_local_inv(qp, 1); break;
		case 2: ibv_wr_send_tso(qp, NULL, 0, 0); break;
		case 3: ibv_wr_set_inline_data(qp, big, sizeof big); break;
		case 4: ibv_wr_set_sge_list(qp, 32, many); break;
		case 5:
			for (int i = 0; i < 4096; i++)
				ibv_wr_rdma_write(qp, p->mr->rkey, to);
			break;
		}
		CHECK(ibv_wr_complete(qp) != 0);
	}
	/* the one that follows arrives, and is the first to */
	strcpy(p->buffer, "after");
	ibv_wr_start(qp);
	begin(qp, 12);
	ibv_wr_rdma_write_imm(qp, p->mr->rkey, to + 64, 5);
	ibv_wr_set_sge(qp, p->mr->lkey, from, 6);
	post_receive(p, 12, 0, 0);
	CHECK(ibv_wr_complete(qp) == 0);
	expect(p->rcq, 12, IBV_WC_RECV_RDMA_WITH_IMM);
	done(cq, 12, IBV_WC_RDMA_WRITE);
	CHECK(p->buffer[SIZE] == 0 && !strcmp(p->buffer + SIZE + 64, "after"));
	CHECK(ibv_poll_cq(p->rcq, 1, &wc) == 0);
}

/* A batch that does not fit behind what is queued posts nothing. */
static void full(struct pair *p, struct ibv_qp_ex *qp, struct ibv_cq_ex *cq)
{
	uint64_t from = (uintptr_t)p->buffer, to = from + SIZE;
	int rounds[3] = { 10, 10, 6 }, results[3] = { 0, ENOMEM, 0 }; /* of 16 */
	for (int i = 0; i < 3; i++) {
		sprintf(p->buffer, "round %d", i);
		ibv_wr_start(qp);
		for (int j = 0; j < rounds[i]; j++) {
			begin(qp, 100 * i + j);
			ibv_wr_rdma_write(qp, p->mr->rkey, to + 64 * i);
			ibv_wr_set_sge(qp, p->mr->lkey, from, 8);
		}
		CHECK(ibv_wr_complete(qp) == results[i]);
	}
	for (int j = 0; j < 10; j++)
		done_or_more(cq, j);
	for (int j = 0; j < 6; j++)
		done_or_more(cq, 200 + j);
	CHECK(!strcmp(p->buffer + SIZE, "round 0") && p->buffer[SIZE + 64] == 0 && !strcmp(p->buffer + SIZE + 128, "round 2"));
}

int main(void)
{
	struct ibv_context *context = open_first();
	struct ibv_cq_init_attr_ex attr = { .cqe = 64, .wc_flags = IBV_WC_STANDARD_FLAGS };
	struct ibv_cq_ex *cq = ibv_create_cq_ex(context, &attr);
	CHECK(cq);
	struct ibv_poll_cq_attr bad = { .comp_mask = 1 };
	CHECK(ibv_start_poll(cq, &bad) == EINVAL);
	struct pair p = make_pair(OPS, context, ibv_cq_ex_to_cq(cq));
	struct ibv_qp_ex *qp = ibv_qp_to_qp_ex(p.qp[0]);
	CHECK(qp);
	batches(&p, qp, cq);
	errors(&p, qp, cq);
	memset(p.buffer + SIZE, 0, SIZE);
	full(&p, qp, cq);
	free_pair(&p);
	CHECK(ibv_close_device(context) == 0);
	return 0;
}
