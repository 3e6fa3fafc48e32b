/* What changes or extends objects: regions registered anew, device memory, domains, imports, on-demand paging, CQs. */
#include "common.h"

#include <sys/mman.h>

enum { LEN = 16 * 1024 };

static void not_supported(const void *object, const char *call)
{
	if (!object && errno == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from %s", call);
}

/* A writes `len` bytes to offset `off` of B's region and tells what came of it. */
static enum ibv_wc_status write_to(struct end *a, uint32_t rkey, uint64_t addr, size_t len)
{
	struct ibv_sge s = sge(a, 0, len);
	struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE };

	w.wr.rdma.remote_addr = addr;
	w.wr.rdma.rkey = rkey;
	OK(post(a, &w, NULL));
	return WAIT(a->scq).status;
}

/* ---- ibv_rereg_mr ------------------------------------------------------------------------------------------------- */

/* The rights change, the key does not; what was allowed is not any more. */
static void rereg_access(void)
{
	struct pair p = pair_open(NULL, NULL);

	if (p.a)
		EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 64), IBV_WC_SUCCESS);
	sync_ends();
	if (p.b) {
		uint32_t key = p.b->mr->rkey;

		EQ(ibv_rereg_mr(p.b->mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_LOCAL_WRITE), 0);
		EQ(p.b->mr->rkey, key);
	}
	sync_ends();
	if (p.a)
		EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 64), IBV_WC_REM_ACCESS_ERR);
}

/* Another range: the new key leads there, the old one nowhere. */
static void rereg_translation(void)
{
	struct pair p = pair_open(NULL, NULL);
	static uint8_t *other;
	uint64_t key = 0, addr = 0;

	if (p.b) {
		other = aligned_alloc(4096, LEN);
		memset(other, GUARD, LEN);
		EQ(ibv_rereg_mr(p.b->mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, other, LEN, 0), 0);
		CHECK(p.b->mr->addr == other && p.b->mr->length == LEN, "the new range");
		key = p.b->mr->rkey;
		addr = (uintptr_t)other;
	}
	key = from_b(key);
	addr = from_b(addr);
	if (p.a) {
		fill(p.a->buf, 64, 3);
		EQ(write_to(p.a, (uint32_t)key, addr, 64), IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		SAME(other, 64, 3);
	sync_ends();
	if (p.a)
		EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 64), IBV_WC_REM_ACCESS_ERR);
	sync_ends();
	if (p.b) {
		end_destroy(p.b);
		free(other);
	}
}

static void rereg_pd_and_bad_arguments(void)
{
	struct ibv_pd *one = MADE(ibv_alloc_pd(ctx)), *two = MADE(ibv_alloc_pd(ctx));
	uint8_t *buf = aligned_alloc(4096, LEN);
	struct ibv_mr *mr = MADE(ibv_reg_mr(one, buf, LEN, IBV_ACCESS_LOCAL_WRITE));

	EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, two, NULL, 0, 0), 0);
	CHECK(mr->pd == two, "the new PD");
	OK(ibv_dealloc_pd(one));
	RC(ibv_dealloc_pd(two), EBUSY);
	EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	EQ(ibv_rereg_mr(mr, 64, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_REMOTE_WRITE), IBV_REREG_MR_ERR_INPUT);
	OK(ibv_dereg_mr(mr));
	OK(ibv_dealloc_pd(two));
	free(buf);
}

/* ---- device memory ------------------------------------------------------------------------------------------------ */

static void device_memory(void)
{
	struct pair p = pair_open(NULL, NULL);
	struct ibv_alloc_dm_attr attr = { .length = 4096 };
	struct ibv_dm *dm = NULL;
	struct ibv_mr *mr = NULL;
	uint8_t bytes[256];

	if (p.b) {
		errno = 0;
		dm = ibv_alloc_dm(ctx, &attr);
		not_supported(dm, "ibv_alloc_dm");
		MADE(dm);
		mr = MADE(ibv_reg_dm_mr(p.b->pd, dm, 1024, 2048, IBV_ACCESS_ZERO_BASED | ALL_ACCESS));
		RC(ibv_free_dm(dm), EBUSY);
	}
	uint64_t key = from_b(mr ? mr->rkey : 0);
	if (p.a) {
		fill(p.a->buf, 256, 9);
		EQ(write_to(p.a, (uint32_t)key, 512, 256), IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b) {
		OK(ibv_memcpy_from_dm(bytes, dm, 1024 + 512, 256));
		SAME(bytes, 256, 9);
	}
	sync_ends();
	if (p.a)
		EQ(write_to(p.a, (uint32_t)key, 2048 - 255, 256), IBV_WC_REM_ACCESS_ERR);
	sync_ends();
	if (p.b) {
		OK(ibv_dereg_mr(mr));
		OK(ibv_free_dm(dm));
	}
}

static void device_memory_errors(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_device_attr_ex ex;
	struct ibv_alloc_dm_attr attr = { .length = 100 };
	uint8_t bytes[128] = { 0 };

	OK(ibv_query_device_ex(ctx, NULL, &ex));
	errno = 0;
	struct ibv_dm *dm = ibv_alloc_dm(ctx, &attr);
	not_supported(dm, "ibv_alloc_dm");
	MADE(dm);
	RC(ibv_memcpy_to_dm(dm, 2, bytes, 4), EINVAL);
	RC(ibv_memcpy_to_dm(dm, 0, bytes, 3), EINVAL);
	RC(ibv_memcpy_to_dm(dm, 100, bytes, 4), EINVAL);
	RC(ibv_memcpy_from_dm(bytes, dm, 0, 104), EINVAL);
	OK(ibv_memcpy_from_dm(bytes, dm, 0, 100));
	ALL(bytes, 100, 0);
	NOT_MADE(ibv_reg_dm_mr(pd, dm, 0, 101, IBV_ACCESS_ZERO_BASED | IBV_ACCESS_LOCAL_WRITE), EINVAL);
	NOT_MADE(ibv_reg_dm_mr(pd, dm, 0, 8, IBV_ACCESS_LOCAL_WRITE), EINVAL);
	OK(ibv_free_dm(dm));
	attr.length = ex.max_dm_size + 1;
	NOT_MADE(ibv_alloc_dm(ctx, &attr), ENOMEM);
	OK(ibv_dealloc_pd(pd));
}

/* ---- domains and imports ------------------------------------------------------------------------------------------ */

static void parent_domain(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_td_init_attr none = { 0 };

	errno = 0;
	struct ibv_td *td = ibv_alloc_td(ctx, &none);
	not_supported(td, "ibv_alloc_td");
	MADE(td);
	struct ibv_parent_domain_init_attr init = { .pd = pd, .td = td };
	struct ibv_pd *parent = MADE(ibv_alloc_parent_domain(ctx, &init));
	RC(ibv_dealloc_pd(pd), EBUSY);
	RC(ibv_dealloc_td(td), EBUSY);
	struct end_cfg c = { .pd = parent };
	struct pair p = pair_loopback(&c, &c);

	end_connect(p.a);
	end_connect(p.b);
	fill(p.a->buf, 100, 4);
	EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 100), IBV_WC_SUCCESS);
	SAME(p.b->buf, 100, 4);
	RC(ibv_dealloc_pd(parent), EBUSY);
	end_destroy(p.a);
	end_destroy(p.b);
	OK(ibv_dealloc_pd(parent));
	init.pd = NULL;
	NOT_MADE(ibv_alloc_parent_domain(ctx, &init), EINVAL);
	OK(ibv_dealloc_td(td));
	OK(ibv_dealloc_pd(pd));
}

/* ---- allocators of a parent domain -------------------------------------------------------------------------------- */

enum lends { MEMORY, THE_DEFAULT, NOTHING };

/* What the program has lent, and on what terms. */
static struct shelf {
	struct ibv_pd *pd;
	enum lends lends;
	int out, times;
	void *piece[64];
	uint64_t type[64];
	size_t bytes;
} shelf;

static void *shelf_alloc(struct ibv_pd *pd, void *context, size_t size, size_t alignment, uint64_t type)
{
	struct shelf *s = context;
	void *piece = NULL;

	CHECK(s == &shelf && (!s->pd || s->pd == pd), "the domain and its context");
	CHECK(size && alignment && !(alignment & (alignment - 1)), "%zu bytes at %zu", size, alignment);
	s->times++;
	if (s->lends != MEMORY)
		return s->lends == NOTHING ? NULL : IBV_ALLOCATOR_USE_DEFAULT;
	CHECK(s->out < (int)COUNT(s->piece), "too many pieces");
	OK(posix_memalign(&piece, alignment, size));
	memset(piece, 0, size);
	s->bytes += size;
	s->type[s->out] = type;
	s->piece[s->out++] = piece;
	return piece;
}

static void shelf_free(struct ibv_pd *pd, void *context, void *piece, uint64_t type)
{
	struct shelf *s = context;
	int at = 0;

	CHECK(s == &shelf && s->pd == pd, "the domain and its context");
	while (at < s->out && s->piece[at] != piece)
		at++;
	CHECK(at < s->out && s->type[at] == type, "what was not lent, or for something else");
	s->piece[at] = s->piece[--s->out];
	s->type[at] = s->type[s->out];
	free(piece);
}

/* Queues in memory that the program lends work, and give it back before their destroyer returns. */
static void parent_domain_allocators(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_parent_domain_init_attr init = {
		.pd = pd, .comp_mask = IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS | IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT,
		.alloc = shelf_alloc, .free = shelf_free, .pd_context = &shelf,
	};

	shelf = (struct shelf){ .lends = MEMORY };
	errno = 0;
	struct ibv_pd *parent = ibv_alloc_parent_domain(ctx, &init);
	not_supported(parent, "ibv_alloc_parent_domain");
	shelf.pd = MADE(parent);

	struct ibv_srq_init_attr shared = { .attr = { .max_wr = 64, .max_sge = 1 } };
	struct ibv_srq *srq = MADE(ibv_create_srq(parent, &shared));
	CHECK(shelf.out > 0, "nothing was asked for");
	struct end_cfg sender = { .pd = parent }, receiver = { .pd = parent, .srq = srq };
	int before = shelf.out;
	struct pair p = pair_loopback(&sender, &receiver);
	CHECK(shelf.out > before && shelf.bytes > 4096, "%d pieces, %zu bytes", shelf.out, shelf.bytes);
	end_connect(p.a);
	end_connect(p.b);
	for (int i = 0; i < 200; i++) { /* round the queues */
		struct ibv_sge s = sge(p.b, 0, 64);
		struct ibv_recv_wr *bad, r = { .wr_id = i, .sg_list = &s, .num_sge = 1 };

		OK(ibv_post_srq_recv(srq, &r, &bad));
		fill(p.a->buf, 64, i);
		OK(post_op(p.a, IBV_WR_SEND, i, 0, 64, 0, 0));
		WANT(p.a->scq, i, IBV_WC_SUCCESS);
		WANT(p.b->rcq, i, IBV_WC_SUCCESS);
		SAME(p.b->buf, 64, i);
		EQ(write_to(p.b, p.b->peer.rkey, p.b->peer.addr, 64), IBV_WC_SUCCESS);
	}
	end_destroy(p.a);
	end_destroy(p.b);
	EQ(shelf.out, before);
	OK(ibv_destroy_srq(srq));
	EQ(shelf.out, 0);

	/* The default, and none: a queue that cannot be made keeps nothing. */
	shelf.lends = THE_DEFAULT;
	shelf.times = 0;
	srq = MADE(ibv_create_srq(parent, &shared));
	CHECK(shelf.times > 0, "nothing was asked for");
	OK(ibv_destroy_srq(srq));
	shelf.lends = NOTHING;
	NOT_MADE(ibv_create_srq(parent, &shared), ENOMEM);
	struct ibv_cq *cq = MADE(ibv_create_cq(ctx, 16, NULL, NULL, 0));
	struct ibv_qp_init_attr q = { .send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .cap = { 4, 4, 1, 1, 0 } };
	NOT_MADE(ibv_create_qp(parent, &q), ENOMEM);
	OK(ibv_destroy_cq(cq));
	EQ(shelf.out, 0);
	OK(ibv_dealloc_pd(parent));
	init.free = NULL;
	NOT_MADE(ibv_alloc_parent_domain(ctx, &init), EINVAL);
	OK(ibv_dealloc_pd(pd));
}

/* ---- what a queue pair says of itself ----------------------------------------------------------------------------- */

/* The options that two devices of one vendor agree on: those of another are refused, and the answer names what is accepted. */
static void ece(void)
{
	struct pair p = pair_loopback(NULL, NULL);
	struct ibv_ece own = { .comp_mask = 7 }, other;
	int error = ibv_query_ece(p.a->qp, &own);

	if (error == EOPNOTSUPP)
		skip_case("EOPNOTSUPP from ibv_query_ece");
	OK(error);
	CHECK(own.vendor_id && !own.comp_mask, "the vendor's number");
	other = own;
	OK(ibv_set_ece(p.b->qp, &other));
	CHECK(!memcmp(&own, &other, sizeof(own)), "accepted as it is");
	other.options = ~0u;
	OK(ibv_set_ece(p.b->qp, &other));
	CHECK(other.options == own.options, "what is accepted of all options");
	other.vendor_id++;
	RC(ibv_set_ece(p.b->qp, &other), EINVAL);
	other = own;
	other.comp_mask = 1;
	RC(ibv_set_ece(p.b->qp, &other), EINVAL);
	end_connect(p.a);
	end_connect(p.b);
	EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 64), IBV_WC_SUCCESS);
}

/* Nobody may wait for a message by looking at its last byte. */
static void data_in_no_order(void)
{
	static const enum ibv_wr_opcode ops[] = { IBV_WR_RDMA_WRITE, IBV_WR_RDMA_READ, IBV_WR_SEND, IBV_WR_RDMA_WRITE_WITH_IMM };
	struct pair p = pair_loopback(NULL, NULL);

	for (size_t i = 0; i < COUNT(ops); i++)
		EQ(ibv_query_qp_data_in_order(p.a->qp, ops[i], 0), 0);
}

/* A second handle on the device and a PD: a QP made through it uses regions of the first. */
static void imports(void)
{
	struct pair p = pair_loopback(NULL, NULL);
	int fd = dup(ctx->cmd_fd);

	errno = 0;
	struct ibv_context *second = ibv_import_device(fd);
	not_supported(second, "ibv_import_device");
	MADE(second);
	struct ibv_pd *pd = MADE(ibv_import_pd(second, p.b->pd->handle));
	struct ibv_mr *mr = MADE(ibv_import_mr(pd, p.b->mr->handle));
	CHECK(mr->rkey == p.b->mr->rkey && mr->length == p.b->mr->length && !mr->addr, "the same region");
	NOT_MADE(ibv_import_pd(second, 0x7fffffff), ENOENT);
	ibv_unimport_mr(mr);
	ibv_unimport_pd(pd);
	OK(ibv_close_device(second));
	end_connect(p.a);
	end_connect(p.b);
	EQ(write_to(p.a, p.a->peer.rkey, p.a->peer.addr, 100), IBV_WC_SUCCESS);
	fd = dup(STDERR_FILENO); /* of nothing that was opened here */
	NOT_MADE(ibv_import_device(fd), EOPNOTSUPP);
	close(fd);
}

/* ---- on-demand paging --------------------------------------------------------------------------------------------- */

/* The whole address space as one region: both its own and a peer's accesses, also to memory that came later. */
static void implicit_on_demand(void)
{
	struct pair p = pair_open(NULL, NULL);
	struct ibv_mr *all = NULL;
	uint8_t *later = NULL;

	if (p.b) {
		errno = 0;
		all = ibv_reg_mr(p.b->pd, NULL, SIZE_MAX, IBV_ACCESS_ON_DEMAND | IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
		not_supported(all, "ibv_reg_mr of everything");
		MADE(all);
		later = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		struct ibv_sge s = { .addr = (uintptr_t)later, .length = LEN, .lkey = all->lkey };
		OK(ibv_advise_mr(p.b->pd, IBV_ADVISE_MR_ADVICE_PREFETCH_WRITE, IBV_ADVISE_MR_FLAG_FLUSH, &s, 1));
		s.lkey ^= 0x1000;
		RC(ibv_advise_mr(p.b->pd, IBV_ADVISE_MR_ADVICE_PREFETCH, 0, &s, 1), ENOENT);
	}
	uint64_t key = from_b(all ? all->rkey : 0), addr = from_b((uintptr_t)later);
	if (p.a) {
		fill(p.a->buf, 4096, 7);
		EQ(write_to(p.a, (uint32_t)key, addr + 100, 4096), IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b) {
		SAME(later + 100, 4096, 7);
		ALL(later, 100, 0);
		OK(ibv_dereg_mr(all));
		munmap(later, LEN);
	}
}

/* ---- completion queues -------------------------------------------------------------------------------------------- */

static void resize(void)
{
	struct end_cfg c = { .one_cq = 1 };
	struct pair p = pair_loopback(&c, &c);

	end_connect(p.a);
	end_connect(p.b);
	OK(ibv_resize_cq(p.a->scq, 500));
	EQ(p.a->scq->cqe, 500);
	for (int i = 0; i < 3; i++)
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, (uint64_t)i, 0, 8, 0, 0));
	RC(ibv_resize_cq(p.a->scq, 2), EINVAL);
	RC(ibv_resize_cq(p.a->scq, 0), EINVAL);
	for (int i = 0; i < 3; i++)
		WANT(p.a->scq, (uint64_t)i, IBV_WC_SUCCESS);
	OK(ibv_resize_cq(p.a->scq, 2));
}

/* Timestamps go up, and lie between two looks at the same clock. */
static void timestamps(void)
{
	struct ibv_cq_init_attr_ex init = { .cqe = 16, .wc_flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK };
	struct ibv_values_ex before = { .comp_mask = IBV_VALUES_MASK_RAW_CLOCK }, after = before;
	struct ibv_poll_cq_attr none = { 0 };

	errno = 0;
	struct ibv_cq_ex *cq = ibv_create_cq_ex(ctx, &init);
	not_supported(cq, "ibv_create_cq_ex");
	MADE(cq);
	struct end_cfg c = { .cq = ibv_cq_ex_to_cq(cq) };
	struct pair p = pair_loopback(&c, &c);

	end_connect(p.a);
	end_connect(p.b);
	OK(ibv_query_rt_values_ex(ctx, &before));
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 0, 0));
	OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 0, 0));
	while (ibv_start_poll(cq, &none) == ENOENT)
		;
	uint64_t first = ibv_wc_read_completion_ts(cq);
	CHECK(ibv_wc_read_completion_wallclock_ns(cq) > 1000000000ull * 1000000000ull, "a date after 2001");
	EQ(cq->wr_id, 1);
	EQ(ibv_next_poll(cq), 0);
	uint64_t second = ibv_wc_read_completion_ts(cq);
	EQ(cq->wr_id, 2);
	ibv_end_poll(cq);
	OK(ibv_query_rt_values_ex(ctx, &after));
	CHECK((uint64_t)before.raw_clock.tv_nsec <= first && first <= second && second <= (uint64_t)after.raw_clock.tv_nsec, "times in order");
	end_destroy(p.a);
	end_destroy(p.b);
	OK(ibv_destroy_cq(ibv_cq_ex_to_cq(cq)));
}

/* Eight bytes that appear at once, from the place that the call names. */
static void atomic_write(void)
{
	struct end_cfg c = { .send_ops = IBV_QP_EX_WITH_ATOMIC_WRITE };
	struct pair p = pair_open(&c, &c);
	uint64_t value = 0x1122334455667788;

	if (p.a) {
		ibv_wr_start(p.a->qpx);
		p.a->qpx->wr_id = 1;
		p.a->qpx->wr_flags = IBV_SEND_SIGNALED;
		ibv_wr_atomic_write(p.a->qpx, p.a->peer.rkey, p.a->peer.addr + 64, &value);
		value = 0;
		OK(ibv_wr_complete(p.a->qpx));
		EQ(WANT(p.a->scq, 1, IBV_WC_SUCCESS).opcode, IBV_WC_ATOMIC_WRITE);
	}
	sync_ends();
	if (p.b) {
		memcpy(&value, p.b->buf + 64, 8);
		EQ(value, 0x1122334455667788);
		ALL(p.b->buf, 64, GUARD);
		ALL(p.b->buf + 72, 64, GUARD);
	}
	sync_ends();
	if (p.a) {
		ibv_wr_start(p.a->qpx);
		ibv_wr_atomic_write(p.a->qpx, p.a->peer.rkey, p.a->peer.addr + 4, &value);
		OK(ibv_wr_complete(p.a->qpx));
		EQ(WAIT(p.a->scq).status, IBV_WC_REM_INV_REQ_ERR);
	}
}

/* ---- the GID table ------------------------------------------------------------------------------------------------ */

static void empty_gid(void)
{
	struct ibv_gid_entry e;
	union ibv_gid gid;

	if (port_attr.gid_tbl_len < 2 || is_rxe)
		skip_case("a full GID table");
	EQ(ibv_query_gid(ctx, port_num, port_attr.gid_tbl_len - 1, &gid), 0);
	ALL(gid.raw, 16, 0);
	RC(ibv_query_gid_ex(ctx, port_num, (uint32_t)port_attr.gid_tbl_len - 1, &e, 0), ENODATA);
	RC(ibv_query_gid_ex(ctx, port_num, (uint32_t)port_attr.gid_tbl_len, &e, 0), EINVAL);
}

/* Under its lkey what is received is discarded, and what is sent is zeros. */
static void null_region(void)
{
	static const size_t lens[] = { 10, 5000, 300000 };
	struct end_cfg c = { .len = 1 << 20, .send_sge = 3, .recv_sge = 3 };
	struct pair p = pair_open(&c, &c);
	struct ibv_mr *na = p.a ? MADE(ibv_alloc_null_mr(p.a->pd)) : NULL, *nb = p.b ? MADE(ibv_alloc_null_mr(p.b->pd)) : NULL;

	for (size_t i = 0; i < COUNT(lens); i++) {
		size_t len = lens[i];

		if (p.b) { /* len bytes kept, len thrown away, len kept */
			struct ibv_sge s[3] = { sge(p.b, 0, len), { .addr = 0, .length = (uint32_t)len, .lkey = nb->lkey }, sge(p.b, len, len) };
			struct ibv_recv_wr r = { .wr_id = i, .sg_list = s, .num_sge = 3 }, *bad;

			reset_buf(p.b);
			OK(ibv_post_recv(p.b->qp, &r, &bad));
		}
		sync_ends();
		if (p.a) { /* data, data, zeros */
			struct ibv_sge s[3] = { sge(p.a, 0, len), sge(p.a, len, len), { .addr = 4, .length = (uint32_t)len, .lkey = na->lkey } };
			struct ibv_send_wr w = { .wr_id = i, .sg_list = s, .num_sge = 3, .opcode = IBV_WR_SEND };

			fill(p.a->buf, 2 * len, i);
			OK(post(p.a, &w, NULL));
			WANT(p.a->scq, i, IBV_WC_SUCCESS);
		}
		if (p.b) {
			EQ(WANT(p.b->rcq, i, IBV_WC_SUCCESS).byte_len, 3 * len);
			SAME(p.b->buf, len, i);
			ALL(p.b->buf + len, len, 0);
			ALL(p.b->buf + 2 * len, 100, GUARD);
		}
		sync_ends();
	}
	if (p.a) { /* a READ into it is made and discarded */
		struct ibv_sge s = { .length = 4096, .lkey = na->lkey };
		struct ibv_send_wr w = { .wr_id = 9, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_READ, .wr.rdma = { p.a->peer.addr, p.a->peer.rkey } };

		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 9, IBV_WC_SUCCESS);
		OK(ibv_dereg_mr(na));
	}
	sync_ends();
	if (p.b)
		OK(ibv_dereg_mr(nb));
}

/* A NIC with an IPv4 address has IPv6's link-local one too, and is reached by either: a program that wants one of that family
 * (NCCL_IB_ADDR_FAMILY=AF_INET6) finds it, and no empty entry in its place. */
static void link_local_gid(void)
{
	static const uint8_t v4_prefix[12] = { 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff };
	struct pair p = pair_create(NULL, NULL);
	struct end *e = p.a ? p.a : p.b;

	if (is_rxe || memcmp(own_gid.raw, v4_prefix, 12))
		skip_case("a table of this device's own");
	struct ibv_gid_entry entry;
	OK(ibv_query_gid_ex(ctx, port_num, 1, &entry, 0));
	CHECK(entry.gid.raw[0] == 0xfe && entry.gid.raw[1] == 0x80 && entry.gid_type == IBV_GID_TYPE_ROCE_V2);
	memcpy(e->me.gid, &entry.gid, 16);
	if (p.a && p.b) {
		memcpy(p.a->peer.gid, &entry.gid, 16);
		memcpy(p.b->peer.gid, &entry.gid, 16);
	} else {
		swap_bytes(&e->me, &e->peer, sizeof(e->me));
	}
	int before = gid_index;
	gid_index = 1;
	if (p.a)
		end_connect(p.a);
	if (p.b)
		end_connect(p.b);
	gid_index = before;
	sync_ends();
	if (p.a) {
		fill(p.a->buf, 64, 1);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 64, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b)
		SAME(p.b->buf, 64, 1);
}

static const struct test_case cases[] = {
	{ "rereg_access", rereg_access, 0 },
	{ "rereg_translation", rereg_translation, 0 },
	{ "rereg_pd_and_bad_arguments", rereg_pd_and_bad_arguments, LOCAL },
	{ "device_memory", device_memory, 0 },
	{ "device_memory_errors", device_memory_errors, LOCAL },
	{ "parent_domain", parent_domain, LOCAL },
	{ "parent_domain_allocators", parent_domain_allocators, LOCAL },
	{ "ece", ece, LOCAL },
	{ "data_in_no_order", data_in_no_order, LOCAL },
	{ "imports", imports, LOCAL },
	{ "implicit_on_demand", implicit_on_demand, 0 },
	{ "resize", resize, LOCAL },
	{ "timestamps", timestamps, LOCAL },
	{ "atomic_write", atomic_write, 0 },
	{ "empty_gid", empty_gid, LOCAL },
	{ "link_local_gid", link_local_gid, 0 },
	{ "null_region", null_region, 0 },
};
SUITE(cases)
