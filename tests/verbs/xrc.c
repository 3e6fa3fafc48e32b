/* XRC: an initiator's request names the shared receive queue it is for; one target serves all queues of its domain. */
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>

enum { QUEUES = 3, LEN = 256 * 1024, XRC_OPS = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD | QP_EX_WITH_FLUSH };

/* One side. A has the initiator, B the target with its domain and queues. */
static struct side {
	struct ibv_pd *pd;
	struct ibv_cq *cq[QUEUES];
	struct ibv_xrcd *xrcd;
	struct ibv_srq *srq[QUEUES];
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	uint8_t *buf;
	struct wire {
		uint32_t qpn, srqn[QUEUES], rkey, spare;
		uint64_t addr;
		uint8_t gid[16];
	} me, peer;
} a, b;

static int access_flags(void)
{
	return is_rxe ? ALL_ACCESS : ALL_ACCESS | ACCESS_FLUSH_GLOBAL;
}

static void common_parts(struct side *s)
{
	*s = (struct side){ 0 };
	s->pd = MADE(ibv_alloc_pd(ctx));
	for (int i = 0; i < QUEUES; i++)
		s->cq[i] = MADE(ibv_create_cq(ctx, 64, NULL, NULL, 0));
	s->buf = calloc(1, LEN);
	s->mr = MADE(ibv_reg_mr(s->pd, s->buf, LEN, access_flags()));
	s->me.rkey = s->mr->rkey;
	s->me.addr = (uintptr_t)s->buf;
	memcpy(s->me.gid, &own_gid, 16);
}

static void open_initiator(bool extended)
{
	struct ibv_qp_init_attr_ex init = { .qp_type = IBV_QPT_XRC_SEND, .send_cq = a.cq[0], .sq_sig_all = 1, .pd = a.pd,
					    .comp_mask = IBV_QP_INIT_ATTR_PD, .cap = { .max_send_wr = 32, .max_send_sge = 1 } };

	if (extended) {
		init.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
		init.send_ops_flags = XRC_OPS;
	}
	a.qp = MADE(ibv_create_qp_ex(ctx, &init));
	a.me.qpn = a.qp->qp_num;
}

static void open_target(void)
{
	struct ibv_xrcd_init_attr domain = { .comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = O_CREAT };
	struct ibv_qp_init_attr_ex init = { .qp_type = IBV_QPT_XRC_RECV, .comp_mask = IBV_QP_INIT_ATTR_XRCD };

	errno = 0;
	b.xrcd = ibv_open_xrcd(ctx, &domain);
	if (!b.xrcd && errno == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from ibv_open_xrcd");
	init.xrcd = MADE(b.xrcd);
	b.qp = MADE(ibv_create_qp_ex(ctx, &init));
	b.me.qpn = b.qp->qp_num;
	for (int i = 0; i < QUEUES; i++) {
		struct ibv_srq_init_attr_ex s = { .attr = { .max_wr = 64, .max_sge = 1 }, .srq_type = IBV_SRQT_XRC, .pd = b.pd, .xrcd = b.xrcd,
						  .cq = b.cq[i],
						  .comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD | IBV_SRQ_INIT_ATTR_XRCD |
							       IBV_SRQ_INIT_ATTR_CQ };

		b.srq[i] = MADE(ibv_create_srq_ex(ctx, &s));
		OK(ibv_get_srq_num(b.srq[i], &b.me.srqn[i]));
	}
}

/* Each end is given the attributes of both directions, and takes its own. */
static void rise(struct side *s)
{
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_INIT, .port_num = port_num, .qp_access_flags = (unsigned)access_flags() };

	OK(ibv_modify_qp(s->qp, &t, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	t = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTR, .path_mtu = port_attr.active_mtu, .dest_qp_num = s->peer.qpn, .max_dest_rd_atomic = 1,
				  .min_rnr_timer = 12,
				  .ah_attr = { .is_global = 1, .port_num = port_num, .grh = { .sgid_index = (uint8_t)gid_index, .hop_limit = 64 } } };
	memcpy(&t.ah_attr.grh.dgid, s->peer.gid, 16);
	OK(ibv_modify_qp(s->qp, &t, IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
					    IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	t = (struct ibv_qp_attr){ .qp_state = IBV_QPS_RTS, .timeout = 16, .retry_cnt = 7, .rnr_retry = 7, .max_rd_atomic = 1 };
	OK(ibv_modify_qp(s->qp, &t, IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT |
					    IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC));
}

static void open_sides(bool extended)
{
	if (is_b) {
		common_parts(&b);
		open_target();
	}
	if (is_a) {
		common_parts(&a);
		open_initiator(extended);
	}
	if (is_a && is_b) {
		a.peer = b.me;
		b.peer = a.me;
	} else {
		struct side *s = is_a ? &a : &b;

		swap_bytes(&s->me, &s->peer, sizeof(s->me));
	}
	if (is_a)
		rise(&a);
	if (is_b)
		rise(&b);
	sync_ends();
}

static void close_side(struct side *s)
{
	OK(ibv_destroy_qp(s->qp));
	for (int i = 0; i < QUEUES; i++)
		if (s->srq[i])
			OK(ibv_destroy_srq(s->srq[i]));
	if (s->xrcd)
		OK(ibv_close_xrcd(s->xrcd));
	OK(ibv_dereg_mr(s->mr));
	for (int i = 0; i < QUEUES; i++)
		OK(ibv_destroy_cq(s->cq[i]));
	OK(ibv_dealloc_pd(s->pd));
	free(s->buf);
}

static void close_sides(void)
{
	sync_ends();
	if (is_a)
		close_side(&a);
	if (is_b)
		close_side(&b);
}

static void post_b(int queue, uint64_t wr_id, size_t off, size_t len)
{
	struct ibv_sge s = { .addr = (uintptr_t)b.buf + off, .length = (uint32_t)len, .lkey = b.mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = wr_id, .sg_list = &s, .num_sge = 1 }, *bad;

	OK(ibv_post_srq_recv(b.srq[queue], &wr, &bad));
}

static int request(enum ibv_wr_opcode op, uint32_t srqn, size_t len, size_t remote_off)
{
	struct ibv_sge s = { .addr = (uintptr_t)a.buf, .length = (uint32_t)len, .lkey = a.mr->lkey };
	struct ibv_send_wr wr = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = op, .imm_data = htonl(77) }, *bad;
	struct ibv_qp_ex *x = ibv_qp_to_qp_ex(a.qp);

	wr.qp_type.xrc.remote_srqn = srqn;
	if (op == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = a.peer.addr + remote_off;
		wr.wr.atomic.rkey = a.peer.rkey;
		wr.wr.atomic.compare_add = 1;
	} else {
		wr.wr.rdma.remote_addr = a.peer.addr + remote_off;
		wr.wr.rdma.rkey = a.peer.rkey;
	}
	if (!x)
		return ibv_post_send(a.qp, &wr, &bad);
	ibv_wr_start(x);
	x->wr_id = 1;
	x->wr_flags = 0;
	switch ((int)op) {
	case IBV_WR_SEND: ibv_wr_send(x); break;
	case IBV_WR_SEND_WITH_IMM: ibv_wr_send_imm(x, wr.imm_data); break;
	case IBV_WR_RDMA_WRITE: ibv_wr_rdma_write(x, a.peer.rkey, a.peer.addr + remote_off); break;
	case IBV_WR_RDMA_READ: ibv_wr_rdma_read(x, a.peer.rkey, a.peer.addr + remote_off); break;
	case IBV_WR_ATOMIC_FETCH_AND_ADD: ibv_wr_atomic_fetch_add(x, a.peer.rkey, a.peer.addr + remote_off, 1); break;
	case WR_FLUSH: wr_flush(x, a.peer.rkey, a.peer.addr + remote_off, len, FLUSH_GLOBAL, FLUSH_RANGE); break;
	default: ibv_wr_send(x);
	}
	ibv_wr_set_xrc_srqn(x, srqn);
	if (op != (enum ibv_wr_opcode)WR_FLUSH)
		ibv_wr_set_sge(x, s.lkey, s.addr, s.length);
	return ibv_wr_complete(x);
}

/* Messages to three queues in turn: each completes on its queue's CQ, in order, whichever CQ is polled first. */
static void sends_by(bool extended, size_t len)
{
	open_sides(extended);
	for (int i = 0; i < 12 && is_b; i++)
		post_b(i % QUEUES, (uint64_t)i, (size_t)i * 8192, 8192);
	sync_ends();
	for (int i = 0; i < 12 && is_a; i++) {
		fill(a.buf, len, (uint64_t)i);
		OK(request(i % 2 ? IBV_WR_SEND : IBV_WR_SEND_WITH_IMM, a.peer.srqn[i % QUEUES], len, 0));
		WANT(a.cq[0], 1, IBV_WC_SUCCESS);
	}
	for (int q = QUEUES; q-- > 0 && is_b;) {
		for (int m = 0; m < 12 / QUEUES; m++) {
			struct ibv_wc wc = WANT(b.cq[q], (uint64_t)(m * QUEUES + q), IBV_WC_SUCCESS);

			EQ(wc.byte_len, len);
			EQ(wc.wc_flags & IBV_WC_WITH_IMM, wc.wr_id % 2 ? 0 : IBV_WC_WITH_IMM);
			if (wc.wr_id % 2 == 0)
				EQ(ntohl(wc.imm_data), 77);
			EQ(wc.qp_num, b.qp->qp_num);
			SAME(b.buf + wc.wr_id * 8192, len, wc.wr_id);
		}
		EMPTY(b.cq[q]);
	}
	close_sides();
}

static void sends_small_post(void) { sends_by(false, 24); }
static void sends_large_post(void) { sends_by(false, 5000); }
static void sends_wr(void) { sends_by(true, 5000); }

static void memory_by(bool extended)
{
	open_sides(extended);
	if (is_a) {
		fill(a.buf, 100000, 5);
		OK(request(IBV_WR_RDMA_WRITE, a.peer.srqn[1], 100000, 64));
		WANT(a.cq[0], 1, IBV_WC_SUCCESS);
		if (extended) {
			OK(request((enum ibv_wr_opcode)WR_FLUSH, a.peer.srqn[1], 100000, 64));
			EQ(WANT(a.cq[0], 1, IBV_WC_SUCCESS).opcode, WC_FLUSH);
		}
		memset(a.buf, 0, 100000);
		OK(request(IBV_WR_RDMA_READ, a.peer.srqn[2], 100000, 64));
		WANT(a.cq[0], 1, IBV_WC_SUCCESS);
		SAME(a.buf, 100000, 5);
		OK(request(IBV_WR_ATOMIC_FETCH_AND_ADD, a.peer.srqn[0], 8, 0));
		WANT(a.cq[0], 1, IBV_WC_SUCCESS);
		EQ(*(uint64_t *)a.buf, 0);
	}
	sync_ends();
	if (is_b) {
		EQ(*(uint64_t *)b.buf, 1);
		SAME(b.buf + 64, 100000, 5);
	}
	close_sides();
}

static void memory_post(void) { memory_by(false); }
static void memory_wr(void) { memory_by(true); }

/* A queue that is not there, or is no XRC queue, is like a port nobody answers at. */
static void a_number_of_nobody(void)
{
	open_sides(false);
	if (is_a) {
		struct ibv_qp_attr t = { .qp_state = IBV_QPS_SQD };

		OK(request(IBV_WR_SEND, a.peer.srqn[0] ^ 1, 8, 0));
		EQ(WAIT(a.cq[0]).status, IBV_WC_RETRY_EXC_ERR);
		EQ(qp_state(a.qp), IBV_QPS_ERR);
		CHECK(ibv_modify_qp(a.qp, &t, IBV_QP_STATE) != 0, "ERR to SQD");
	}
	close_sides();
}

static void limits_and_errors(void)
{
	struct ibv_xrcd_init_attr domain = { .comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = O_CREAT };
	struct ibv_qp_init_attr_ex init = { .qp_type = IBV_QPT_XRC_RECV };
	struct ibv_srq_init_attr_ex s = { .attr = { .max_wr = 4, .max_sge = 1 }, .srq_type = IBV_SRQT_XRC, .comp_mask = IBV_SRQ_INIT_ATTR_TYPE };
	struct ibv_srq_init_attr basic = { .attr = { .max_wr = 4, .max_sge = 1 } };
	uint32_t number;

	common_parts(&b);
	b.xrcd = MADE(ibv_open_xrcd(ctx, &domain));
	NOT_MADE(ibv_create_qp_ex(ctx, &init), EINVAL);
	NOT_MADE(ibv_create_srq_ex(ctx, &s), EINVAL);
	domain.comp_mask = 0;
	NOT_MADE(ibv_open_xrcd(ctx, &domain), EINVAL);
	init.comp_mask = IBV_QP_INIT_ATTR_XRCD;
	init.xrcd = b.xrcd;
	b.qp = MADE(ibv_create_qp_ex(ctx, &init));
	RC(ibv_close_xrcd(b.xrcd), EBUSY);
	struct ibv_send_wr wr = { .opcode = IBV_WR_SEND }, *bad;
	struct ibv_recv_wr rwr = { 0 }, *rbad;
	RC(ibv_post_send(b.qp, &wr, &bad), EINVAL);
	RC(ibv_post_recv(b.qp, &rwr, &rbad), EINVAL);
	struct ibv_srq *plain = MADE(ibv_create_srq(b.pd, &basic));
	RC(ibv_get_srq_num(plain, &number), EINVAL);
	OK(ibv_destroy_srq(plain));
	close_side(&b);
}

/* Whoever names the file gets the same domain, and in it the same target; each stays until its last handle is closed. */
static void a_file_names_the_domain(void)
{
	struct ibv_xrcd_init_attr domain = { .comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS };
	struct ibv_qp_open_attr open = { .comp_mask = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE | IBV_QP_OPEN_ATTR_CONTEXT,
					 .qp_type = IBV_QPT_XRC_RECV, .qp_context = &domain };
	struct ibv_qp_init_attr_ex init = { .qp_type = IBV_QPT_XRC_RECV, .comp_mask = IBV_QP_INIT_ATTR_XRCD };
	struct ibv_qp_attr t = { .qp_state = IBV_QPS_INIT, .port_num = port_num };
	FILE *file = MADE(tmpfile()), *another = MADE(tmpfile());

	common_parts(&b);
	domain.fd = fileno(file);
	NOT_MADE(ibv_open_xrcd(ctx, &domain), EAGAIN);
	domain.oflags = O_CREAT;
	struct ibv_xrcd *first = MADE(ibv_open_xrcd(ctx, &domain));
	domain.oflags = O_CREAT | O_EXCL;
	NOT_MADE(ibv_open_xrcd(ctx, &domain), EINVAL);
	domain.oflags = 0;
	domain.fd = dup(fileno(file));
	struct ibv_xrcd *second = MADE(ibv_open_xrcd(ctx, &domain));
	OK(close(domain.fd));
	NOT_MADE(ibv_open_xrcd(ctx, &domain), EBADF);
	domain.fd = fileno(another);
	domain.oflags = O_CREAT;
	struct ibv_xrcd *other = MADE(ibv_open_xrcd(ctx, &domain));

	init.xrcd = first;
	struct ibv_qp *made = MADE(ibv_create_qp_ex(ctx, &init));
	open.qp_num = made->qp_num;
	open.xrcd = other;
	NOT_MADE(ibv_open_qp(ctx, &open), EINVAL);
	open.xrcd = second;
	struct ibv_qp *opened = MADE(ibv_open_qp(ctx, &open));
	CHECK(opened != made && opened->qp_num == made->qp_num && opened->qp_context == &domain, "another handle of it");
	OK(ibv_modify_qp(made, &t, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	EQ(qp_state(opened), IBV_QPS_INIT);
	RC(ibv_close_xrcd(first), EBUSY);
	RC(ibv_close_xrcd(second), EBUSY);
	OK(ibv_destroy_qp(made));
	OK(ibv_close_xrcd(first));
	EQ(qp_state(opened), IBV_QPS_INIT);
	OK(ibv_destroy_qp(opened));
	NOT_MADE(ibv_open_qp(ctx, &open), EINVAL);
	OK(ibv_close_xrcd(second));
	OK(ibv_close_xrcd(other));
	domain.fd = fileno(file);
	domain.oflags = 0;
	NOT_MADE(ibv_open_xrcd(ctx, &domain), EAGAIN);
	OK(fclose(file));
	OK(fclose(another));
	OK(ibv_dereg_mr(b.mr));
	for (int i = 0; i < QUEUES; i++)
		OK(ibv_destroy_cq(b.cq[i]));
	OK(ibv_dealloc_pd(b.pd));
	free(b.buf);
}

/* Two processes that name the same file have a domain each (docs/xrc.md): a target of the other's is nobody's. */
static void a_file_joins_no_processes(void)
{
	struct ibv_xrcd_init_attr domain = { .comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .oflags = O_CREAT | O_EXCL };
	struct ibv_qp_open_attr open_attr = { .comp_mask = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE,
					      .qp_type = IBV_QPT_XRC_RECV };
	struct ibv_qp_init_attr_ex init = { .qp_type = IBV_QPT_XRC_RECV, .comp_mask = IBV_QP_INIT_ATTR_XRCD };
	uint32_t mine, theirs;

	if (is_a && is_b)
		return; /* a_file_names_the_domain */
	domain.fd = open("/proc/self/exe", O_RDONLY);
	CHECK(domain.fd >= 0, "cannot open this program's file");
	init.xrcd = MADE(ibv_open_xrcd(ctx, &domain));
	struct ibv_qp *target = MADE(ibv_create_qp_ex(ctx, &init));
	mine = target->qp_num;
	swap_bytes(&mine, &theirs, sizeof(mine));
	CHECK(mine != theirs, "two targets have one number");
	open_attr.xrcd = init.xrcd;
	open_attr.qp_num = theirs;
	NOT_MADE(ibv_open_qp(ctx, &open_attr), EINVAL);
	open_attr.qp_num = mine;
	OK(ibv_destroy_qp(MADE(ibv_open_qp(ctx, &open_attr))));
	sync_ends();
	OK(ibv_destroy_qp(target));
	OK(ibv_close_xrcd(init.xrcd));
	OK(close(domain.fd));
}

/* Messages for a target arrive at the queues of its domain, whichever handle made them and whether its maker still has it. */
static void messages_by_an_opened_target(void)
{
	struct ibv_qp *made = NULL;

	open_sides(false);
	if (is_b) {
		struct ibv_qp_open_attr open = { .comp_mask = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE,
						 .qp_type = IBV_QPT_XRC_RECV, .qp_num = b.qp->qp_num, .xrcd = b.xrcd };

		made = b.qp;
		b.qp = MADE(ibv_open_qp(ctx, &open));
		OK(ibv_destroy_qp(made));
		post_b(1, 8, 0, 100);
	}
	sync_ends();
	if (is_a) {
		fill(a.buf, 100, 3);
		OK(request(IBV_WR_SEND, a.peer.srqn[1], 100, 0));
		WANT(a.cq[0], 1, IBV_WC_SUCCESS);
	}
	if (is_b) {
		WANT(b.cq[1], 8, IBV_WC_SUCCESS);
		SAME(b.buf, 100, 3);
	}
	close_sides();
}

static const struct test_case cases[] = {
	{ "sends_small_post", sends_small_post, 0 },
	{ "sends_large_post", sends_large_post, 0 },
	{ "sends_wr", sends_wr, 0 },
	{ "memory_post", memory_post, 0 },
	{ "memory_wr", memory_wr, 0 },
	{ "a_number_of_nobody", a_number_of_nobody, 0 },
	{ "limits_and_errors", limits_and_errors, LOCAL },
	{ "a_file_names_the_domain", a_file_names_the_domain, LOCAL },
	{ "a_file_joins_no_processes", a_file_joins_no_processes, 0 },
	{ "messages_by_an_opened_target", messages_by_an_opened_target, 0 },
};
SUITE(cases)
