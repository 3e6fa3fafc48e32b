/* Objects: made and destroyed in the right order, refused in the wrong one, and memory regions over every kind of memory. */
#include "common.h"

#include <fcntl.h>
#include <sys/mman.h>

static struct ibv_qp *small_qp(struct ibv_pd *pd, struct ibv_cq *cq, enum ibv_qp_type type)
{
	struct end_cfg c = { .type = type, .send_wr = 4, .recv_wr = 4 };
	struct ibv_qp_init_attr a = qp_init_attr(&c, cq, cq);

	return MADE(ibv_create_qp(pd, &a));
}

/* ---- who holds whom ---------------------------------------------------------------------------------------------- */

static void pd_busy(void)
{
	static uint8_t buf[64];
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));

	CHECK(pd->context == ctx, "the PD's context is another");
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, sizeof(buf), 0));
	RC(ibv_dealloc_pd(pd), EBUSY);
	OK(ibv_dereg_mr(mr));
	struct ibv_qp *qp = small_qp(pd, cq, IBV_QPT_RC);
	RC(ibv_dealloc_pd(pd), EBUSY);
	OK(ibv_destroy_qp(qp));
	struct ibv_ah_attr a = { .is_global = 1, .port_num = port_num, .grh = { .dgid = own_gid, .sgid_index = (uint8_t)gid_index } };
	struct ibv_ah *ah = MADE(ibv_create_ah(pd, &a));
	RC(ibv_dealloc_pd(pd), EBUSY);
	OK(ibv_destroy_ah(ah));
	OK(ibv_destroy_cq(cq));
	OK(ibv_dealloc_pd(pd));
}

static void cq_busy(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_cq *scq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0)), *rcq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
	struct ibv_qp_init_attr a = qp_init_attr(NULL, scq, rcq);
	struct ibv_qp *qp = MADE(ibv_create_qp(pd, &a));

	RC(ibv_destroy_cq(scq), EBUSY);
	RC(ibv_destroy_cq(rcq), EBUSY);
	EMPTY(scq);
	OK(ibv_destroy_qp(qp));
	OK(ibv_destroy_cq(scq));
	OK(ibv_destroy_cq(rcq));
	OK(ibv_dealloc_pd(pd));
}

static void channel_busy(void)
{
	int context = 0;
	struct ibv_comp_channel *channel = MADE(ibv_create_comp_channel(ctx));
	struct ibv_cq *one = MADE(ibv_create_cq(ctx, 16, &context, channel, 0)), *two = MADE(ibv_create_cq(ctx, 16, NULL, channel, 0));

	CHECK(one->channel == channel && one->cq_context == &context && one->context == ctx, "the CQ's fields are others");
	RC(ibv_destroy_comp_channel(channel), EBUSY);
	OK(ibv_destroy_cq(one));
	RC(ibv_destroy_comp_channel(channel), EBUSY);
	OK(ibv_destroy_cq(two));
	OK(ibv_destroy_comp_channel(channel));
}

/* ---- arguments --------------------------------------------------------------------------------------------------- */

static void qp_arguments(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
	struct ibv_qp_init_attr a = qp_init_attr(NULL, cq, cq);
	int context = 0;

	a.qp_context = &context;
	struct ibv_qp *qp = MADE(ibv_create_qp(pd, &a));
	CHECK(qp->qp_context == &context && qp->pd == pd && qp->context == ctx, "the QP's fields are others");
	CHECK(qp->send_cq == cq && qp->recv_cq == cq && !qp->srq, "the QP's queues are others");
	EQ(qp->qp_type, IBV_QPT_RC);
	EQ(qp->state, IBV_QPS_RESET);
	OK(ibv_destroy_qp(qp));
	a.qp_type = (enum ibv_qp_type)77;
	errno = 0;
	qp = ibv_create_qp(pd, &a);
	CHECK(!qp && (errno == EINVAL || errno == EOPNOTSUPP), "a QP of type 77: %p, errno %d", (void *)qp, errno);
	a.qp_type = (enum ibv_qp_type)0;
	errno = 0;
	qp = ibv_create_qp(pd, &a);
	CHECK(!qp && (errno == EINVAL || errno == EOPNOTSUPP), "a QP of type 0: %p, errno %d", (void *)qp, errno);
	OK(ibv_destroy_cq(cq));
	OK(ibv_dealloc_pd(pd));
}

static void ah_arguments(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_ah_attr good = { .is_global = 1, .port_num = port_num, .grh = { .dgid = own_gid, .sgid_index = (uint8_t)gid_index } };
	struct ibv_ah_attr bad = good;

	bad.port_num = 2;
	NOT_MADE(ibv_create_ah(pd, &bad), EINVAL);
	bad = good;
	bad.port_num = 0;
	NOT_MADE(ibv_create_ah(pd, &bad), EINVAL);
	bad = good;
	bad.is_global = 0; /* by LID, and 0 is none */
	NOT_MADE(ibv_create_ah(pd, &bad), EINVAL);
	if (port_attr.gid_tbl_len < 255) {
		bad = good;
		bad.grh.sgid_index = 255;
		NOT_MADE(ibv_create_ah(pd, &bad), EINVAL);
	}
	struct ibv_ah *ah[64];
	for (size_t i = 0; i < COUNT(ah); i++) {
		ah[i] = MADE(ibv_create_ah(pd, &good));
		CHECK(ah[i]->pd == pd && ah[i]->context == ctx, "the AH's fields are others");
	}
	for (size_t i = 0; i < COUNT(ah); i++)
		OK(ibv_destroy_ah(ah[i]));
	OK(ibv_dealloc_pd(pd));
}

static void cq_resize(void)
{
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
	int rc = ibv_resize_cq(cq, 200);

	if (rc == EOPNOTSUPP || rc == ENOSYS) {
		OK(ibv_destroy_cq(cq));
		skip_case("EOPNOTSUPP");
	}
	OK(rc);
	CHECK(cq->cqe >= 200, "got %d", cq->cqe);
	RC(ibv_resize_cq(cq, dev_attr.max_cqe + 1), EINVAL);
	OK(ibv_destroy_cq(cq));
}

/* ---- memory regions ---------------------------------------------------------------------------------------------- */

static void mr_access_rules(void)
{
	enum { LEN = 16384 };
	uint8_t *buf = MADE(malloc(LEN));
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));

	for (int access = 0; access < 16; access++) {
		int needs = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC;

		if ((access & needs) && !(access & IBV_ACCESS_LOCAL_WRITE)) {
			NOT_MADE(ibv_reg_mr(pd, buf, LEN, access), EINVAL);
			continue;
		}
		struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, LEN, access));
		CHECK(mr->pd == pd && mr->context == ctx && mr->addr == buf && mr->length == LEN, "the MR's fields are others");
		OK(ibv_dereg_mr(mr));
	}
	/* optional flags are ignored where they mean nothing */
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, LEN, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING));
	OK(ibv_dereg_mr(mr));
	errno = 0;
	mr = ibv_reg_mr(pd, buf, LEN, 1 << 18); /* neither known nor optional */
	CHECK(!mr && (errno == EINVAL || errno == EOPNOTSUPP), "an unknown flag: %p, errno %d", (void *)mr, errno);
	OK(ibv_dealloc_pd(pd));
	free(buf);
}

static void mr_bad_memory(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	uint8_t *hole = mmap(NULL, 3 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(hole != MAP_FAILED, "mmap");
	EQ(munmap(hole + page, page), 0);
	NOT_MADE(ibv_reg_mr(pd, hole + page, 1, 0), EFAULT);
	NOT_MADE(ibv_reg_mr(pd, hole, 3 * page, IBV_ACCESS_LOCAL_WRITE), EFAULT);
	NOT_MADE(ibv_reg_mr(pd, hole + page - 1, 2, ALL_ACCESS), EFAULT);
	NOT_MADE(ibv_reg_mr(pd, NULL, page, ALL_ACCESS), EFAULT);
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, hole, page, ALL_ACCESS));
	OK(ibv_dereg_mr(mr));
	errno = 0;
	mr = ibv_reg_mr(pd, hole, SIZE_MAX - 4096, ALL_ACCESS);
	CHECK(!mr && (errno == EINVAL || errno == EFAULT || errno == ENOMEM), "a length that wraps: %p, errno %d", (void *)mr, errno);
	EQ(munmap(hole, page), 0);
	EQ(munmap(hole + 2 * page, page), 0);
	OK(ibv_dealloc_pd(pd));
}

/* A region of no bytes: providers differ (soft-RoCE makes one, mlx5 says EINVAL); what is made can be destroyed. */
static void mr_of_zero_bytes(void)
{
	static uint8_t byte;
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));

	errno = 0;
	struct ibv_mr *mr = ibv_reg_mr(pd, &byte, 0, IBV_ACCESS_LOCAL_WRITE);
	if (mr) {
		EQ(mr->length, 0);
		OK(ibv_dereg_mr(mr));
	} else {
		EQ(errno, EINVAL);
	}
	OK(ibv_dealloc_pd(pd));
}

/*
 * Writes through one QP pair into [p, p+len) and reads it back by RDMA; the bytes around stay.  Read-only regions are
 * only read.  `writable` also tells whether the memory itself may be written here.
 */
static void use_memory(struct pair *q, uint8_t *p, size_t len, bool writable)
{
	int access = IBV_ACCESS_REMOTE_READ | (writable ? IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE : 0);
	struct ibv_mr *mr = MADE(ibv_reg_mr(q->b->pd, p, len, access));
	uint8_t expect[512];

	CHECK(len <= sizeof(expect), "a short region");
	q->a->peer.addr = (uintptr_t)p;
	q->a->peer.rkey = mr->rkey;
	memcpy(expect, p, len);
	if (writable) {
		uint8_t before = p[-1], after = p[len];

		fill(q->a->buf, len, (uintptr_t)p);
		memcpy(expect, q->a->buf, len);
		OK(post_op(q->a, IBV_WR_RDMA_WRITE, 1, 0, len, 0, 0));
		WANT(q->a->scq, 1, IBV_WC_SUCCESS);
		EQ(memcmp(p, expect, len), 0);
		EQ(p[-1], before);
		EQ(p[len], after);
		memset(p, 0x21, len); /* what the program writes now is what a read brings */
		memset(expect, 0x21, len);
	}
	OK(post_op(q->a, IBV_WR_RDMA_READ, 2, 2048, len, 0, 0));
	WANT(q->a->scq, 2, IBV_WC_SUCCESS);
	EQ(memcmp(q->a->buf + 2048, expect, len), 0);
	OK(ibv_dereg_mr(mr));
	EQ(memcmp(p, expect, len), 0);
}

static struct pair one_process(void)
{
	struct pair q = pair_loopback(NULL, NULL);

	end_connect(q.a);
	end_connect(q.b);
	return q;
}

static void mr_alignments(void)
{
	struct pair q = one_process();
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	uint8_t *heap = MADE(malloc(8 * page));
	static const size_t LENS[] = { 1, 2, 7, 8, 63, 500 };

	memset(heap, 1, 8 * page);
	for (size_t i = 0; i < COUNT(LENS); i++)
		for (size_t off = 1; off < 4; off++) {
			uintptr_t edge = ((uintptr_t)heap + 4 * page) & ~(page - 1);

			use_memory(&q, heap + off, LENS[i], true);
			use_memory(&q, (uint8_t *)edge + off, LENS[i], true);
			use_memory(&q, (uint8_t *)edge - off, LENS[i], true);
			use_memory(&q, (uint8_t *)edge - off - LENS[i], LENS[i], true);
		}
	free(heap);
}

static uint8_t in_data[1024] = { 1 }, in_bss[1024];
static const uint8_t in_rodata[1024] = "read-only";

static void mr_mapping_kinds(void)
{
	struct pair q = one_process();
	uint8_t on_stack[1024];
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	const int flags[] = { MAP_PRIVATE | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS };

	memset(on_stack, 1, sizeof(on_stack));
	use_memory(&q, on_stack + 100, 500, true);
	use_memory(&q, in_data + 100, 500, true);
	use_memory(&q, in_bss + 100, 500, true);
	use_memory(&q, (uint8_t *)(uintptr_t)in_rodata + 100, 500, false);
	for (size_t i = 0; i < COUNT(flags); i++) {
		uint8_t *p = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, flags[i], -1, 0);

		CHECK(p != MAP_FAILED, "mmap");
		use_memory(&q, p + page - 250, 500, true); /* across pages that were never touched */
		use_memory(&q, p + 1, 500, true);
		EQ(munmap(p, 2 * page), 0);
	}
}

/* Atomics on memory that a provider cannot give them on are refused by the registration; where it is taken, they work. */
static void mr_atomic_or_refused(void)
{
	struct pair q = one_process();
	uint64_t on_stack[16] = { 41 }, *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	uint64_t *places[] = { on_stack, (uint64_t *)(void *)in_bss, shared };

	CHECK(shared != MAP_FAILED, "mmap");
	for (size_t i = 0; i < COUNT(places); i++) {
		uint64_t *word = (uint64_t *)(((uintptr_t)places[i] + 7) & ~(uintptr_t)7);

		*word = 41;
		errno = 0;
		struct ibv_mr *mr = ibv_reg_mr(q.b->pd, word, 8, ALL_ACCESS);
		if (!mr) {
			EQ(errno, EOPNOTSUPP);
			continue;
		}
		q.a->peer.addr = (uintptr_t)word;
		q.a->peer.rkey = mr->rkey;
		OK(post_op(q.a, IBV_WR_ATOMIC_FETCH_AND_ADD, 1, 0, 8, 0, 0));
		WANT(q.a->scq, 1, IBV_WC_SUCCESS);
		EQ(*(volatile uint64_t *)word, 42);
		OK(ibv_dereg_mr(mr));
	}
	EQ(munmap(shared, 4096), 0);
}

static size_t page(void)
{
	return (size_t)sysconf(_SC_PAGESIZE);
}

static void mr_of_files(void)
{
	struct pair q = one_process();
	char path[] = "/tmp/conformance-XXXXXX";
	int fd = mkstemp(path);

	CHECK(fd >= 0, "mkstemp");
	EQ(unlink(path), 0);
	EQ(write(fd, in_rodata, sizeof(in_rodata)), (ssize_t)sizeof(in_rodata));
	uint8_t *private_ro = mmap(NULL, 1024, PROT_READ, MAP_PRIVATE, fd, 0), *shared_ro = mmap(NULL, 1024, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(private_ro != MAP_FAILED && shared_ro != MAP_FAILED, "mmap");
	use_memory(&q, private_ro, 500, false);
	/* Kernels before 6.3 ask for write access to every page and so refuse a shared read-only mapping. */
	uint8_t *source = is_rxe ? private_ro : shared_ro;
	use_memory(&q, source, 500, false);
	struct ibv_mr *local = MADE(ibv_reg_mr(q.a->pd, source, 1024, 0)); /* as a source only */
	struct ibv_sge s = { (uintptr_t)source, 300, local->lkey };
	struct ibv_send_wr w = { .wr_id = 9, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE };

	w.wr.rdma.remote_addr = q.b->me.addr;
	w.wr.rdma.rkey = q.b->me.rkey;
	OK(post(q.a, &w, NULL));
	WANT(q.a->scq, 9, IBV_WC_SUCCESS);
	EQ(memcmp(q.b->buf, in_rodata, 300), 0);
	OK(ibv_dereg_mr(local));
	/* writing into pages that may not be written is refused here, not at the first write */
	NOT_MADE(ibv_reg_mr(q.a->pd, private_ro, 1024, IBV_ACCESS_LOCAL_WRITE), EFAULT);
	EQ(munmap(private_ro, 1024), 0);
	EQ(munmap(shared_ro, 1024), 0);
	/* and a shared, writable file mapping: what arrives by RDMA is in the file */
	uint8_t *rw = mmap(NULL, 1024, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), back[500];
	CHECK(rw != MAP_FAILED, "mmap");
	use_memory(&q, rw + 100, 500, true);
	EQ(pread(fd, back, 500, 100), 500);
	EQ(memcmp(rw + 100, back, 500), 0);
	EQ(munmap(rw, 1024), 0);
	close(fd);
}

/* Regions that overlap are all valid, and one's end is not the others'. */
static void mr_overlapping(void)
{
	struct pair q = one_process();
	uint8_t *p = MADE(calloc(1, 3 * 4096));
	struct ibv_mr *mr[12];

	for (size_t i = 0; i < COUNT(mr); i++)
		mr[i] = MADE(ibv_reg_mr(q.b->pd, p + 100 * i, 8192, ALL_ACCESS));
	for (size_t i = 0; i < COUNT(mr); i += 2)
		OK(ibv_dereg_mr(mr[i]));
	for (size_t i = 1; i < COUNT(mr); i += 2) {
		fill(q.a->buf, 256, i);
		q.a->peer.addr = (uintptr_t)p + 100 * i + 4000;
		q.a->peer.rkey = mr[i]->rkey;
		OK(post_op(q.a, IBV_WR_RDMA_WRITE, i, 0, 256, 0, 0));
		WANT(q.a->scq, i, IBV_WC_SUCCESS);
		SAME(p + 100 * i + 4000, 256, i);
		OK(ibv_dereg_mr(mr[i]));
		SAME(p + 100 * i + 4000, 256, i);
	}
	free(p);
}

/* Regions of two PDs in one page: each takes writes and reads, and neither loses a byte to the other. */
static void mr_of_two_pds_in_one_page(void)
{
	enum { ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	struct pair q[2] = { one_process(), one_process() };
	uint8_t *p = mmap(NULL, page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct ibv_mr *mr[2];

	CHECK(p != MAP_FAILED, "mmap");
	memset(p, GUARD, page());
	for (size_t i = 0; i < 2; i++) {
		mr[i] = MADE(ibv_reg_mr(q[i].b->pd, p + 100 + 1000 * i, 500, ACCESS));
		q[i].a->peer.addr = (uintptr_t)p + 100 + 1000 * i;
		q[i].a->peer.rkey = mr[i]->rkey;
	}
	for (uint64_t turn = 0; turn < 10; turn++)
		for (size_t i = 0; i < 2; i++) {
			fill(q[i].a->buf, 500, 10 * turn + i);
			OK(post_op(q[i].a, IBV_WR_RDMA_WRITE, turn, 0, 500, 0, 0));
			WANT(q[i].a->scq, turn, IBV_WC_SUCCESS);
			SAME(p + 100 + 1000 * i, 500, 10 * turn + i);
			OK(post_op(q[i].a, IBV_WR_RDMA_READ, turn, 2048, 500, 0, 0));
			WANT(q[i].a->scq, turn, IBV_WC_SUCCESS);
			SAME(q[i].a->buf + 2048, 500, 10 * turn + i);
		}
	OK(ibv_dereg_mr(mr[0]));
	SAME(p + 100, 500, 90);
	SAME(p + 1100, 500, 91);
	OK(ibv_dereg_mr(mr[1]));
	SAME(p + 1100, 500, 91);
	ALL(p, 100, GUARD);
	ALL(p + 600, 500, GUARD);
	ALL(p + 1600, page() - 1600, GUARD);
	EQ(munmap(p, page()), 0);
}

/* More regions than a process may have mappings to spare; atomics are not asked for, as they may need one of its own each. */
static void mr_many(void)
{
	enum { N = 20000, SIZE = 4096, ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	static struct ibv_mr *mr[N];
	struct pair q = one_process();
	uint8_t *p = mmap(NULL, (size_t)N * SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED, "mmap");
	for (size_t i = 0; i < N; i++)
		mr[i] = MADE(ibv_reg_mr(q.b->pd, p + i * SIZE, SIZE, ACCESS));
	for (size_t i = 0; i < N; i += 97) {
		fill(q.a->buf, 128, i);
		q.a->peer.addr = (uintptr_t)p + i * SIZE + 64;
		q.a->peer.rkey = mr[i]->rkey;
		OK(post_op(q.a, IBV_WR_RDMA_WRITE, i, 0, 128, 0, 0));
		WANT(q.a->scq, i, IBV_WC_SUCCESS);
	}
	for (size_t i = 0; i < N; i++)
		OK(ibv_dereg_mr(mr[i]));
	for (size_t i = 0; i < N; i += 97) {
		SAME(p + i * SIZE + 64, 128, i);
		ALL(p + i * SIZE + 192, SIZE - 192, 0);
	}
	EQ(munmap(p, (size_t)N * SIZE), 0);
}

#define CASE(name) { #name, name, LOCAL }
static const struct test_case cases[] = {
	CASE(pd_busy),	     CASE(cq_busy),	CASE(channel_busy),   CASE(qp_arguments),     CASE(ah_arguments),
	CASE(cq_resize),     CASE(mr_access_rules), CASE(mr_bad_memory),  CASE(mr_of_zero_bytes), CASE(mr_alignments),
	CASE(mr_mapping_kinds), CASE(mr_atomic_or_refused), CASE(mr_of_files),	CASE(mr_overlapping), CASE(mr_of_two_pds_in_one_page), CASE(mr_many),
};
SUITE(cases)
