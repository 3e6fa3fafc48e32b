/* RC: every kind of failure has its status, at the end that the specification says, and takes the QP and only the QP with it. */
#include "common.h"

#include <pthread.h>

/* ---- what follows a failure -------------------------------------------------------------------------------------- */

/*
 * The QP is in ERR, and what is posted now flushes, in order, on both queues.
 * soft-RoCE 6.1 is not told of receives posted by a process, and so does not flush those posted after the error.
 */
static void flushes(struct end *e)
{
	EQ(qp_state(e->qp), IBV_QPS_ERR);
	for (uint64_t i = 900; i < 903; i++) {
		OK(post_op(e, IBV_WR_RDMA_WRITE, i, 0, 8, 0, 0));
		if (!is_rxe)
			OK(post_receive(e, i + 10, 0, 8));
	}
	for (uint64_t i = 900; i < 903; i++) {
		EQ(WANT(e->scq, i, IBV_WC_WR_FLUSH_ERR).qp_num, e->qp->qp_num);
		if (!is_rxe)
			EQ(WANT(e->rcq, i + 10, IBV_WC_WR_FLUSH_ERR).qp_num, e->qp->qp_num);
	}
	EMPTY(e->scq);
	EMPTY(e->rcq);
}

struct trial {
	const struct end_cfg *a, *b;
	enum ibv_wr_opcode op;
	enum ibv_wc_status status; /* at A */
	enum ibv_wc_status remote; /* at B's receive, WR_FLUSH_ERR where it only flushes, SUCCESS where B's QP need not fail */
	enum ibv_wc_status remote_or; /* at B's receive as well, where the specification leaves it open */
	size_t off, len, remote_off, recv_len; /* len 0 stands for 8, recv_len 0 for 512 */
	uint32_t rkey_xor, lkey_xor;
	int recv_first_lkey_bad;
	const struct ibv_mr *target; /* at B, instead of its own MR */
};

static void post_trial(struct end *e, const struct trial *t, uint64_t addr, uint32_t rkey)
{
	struct ibv_sge s = sge(e, t->off, t->len ? t->len : 8);
	struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = t->op };

	s.lkey ^= t->lkey_xor;
	if (is_atomic(t->op)) {
		w.wr.atomic.remote_addr = addr + t->remote_off;
		w.wr.atomic.rkey = rkey ^ t->rkey_xor;
	} else {
		w.wr.rdma.remote_addr = addr + t->remote_off;
		w.wr.rdma.rkey = rkey ^ t->rkey_xor;
	}
	OK(post(e, &w, NULL));
}

/*
 * One request that must fail, with one good before it and two behind it.  Nothing of B's memory may change but by the
 * good one; A's QP ends in ERR; another QP pair of the same processes goes on working.
 */
static void run_trial(const struct trial *t)
{
	struct pair other = pair_open(NULL, NULL), p = pair_open(t->a, t->b);
	uint64_t addr = 0, rkey = 0;

	if (p.b) {
		struct ibv_sge s = sge(p.b, 1024, t->recv_len ? t->recv_len : 512);
		struct ibv_recv_wr r = { .wr_id = 41, .sg_list = &s, .num_sge = 1 }, *bad;

		if (t->recv_first_lkey_bad)
			s.lkey ^= 0x5500;
		addr = t->target ? (uintptr_t)t->target->addr : (uintptr_t)p.b->buf;
		rkey = t->target ? t->target->rkey : p.b->mr->rkey;
		OK(ibv_post_recv(p.b->qp, &r, &bad));
		OK(post_receive(p.b, 42, 1024, 512));
	}
	addr = from_b(addr);
	rkey = from_b(rkey);
	if (p.a) {
		memset(p.a->buf, 0x11, p.a->len);
		post_trial(p.a, t, addr, (uint32_t)rkey);
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 0, 0));
		OK(post_op(p.a, IBV_WR_SEND, 3, 0, 8, 0, 0));
		struct ibv_wc wc = WANT(p.a->scq, 1, t->status);
		EQ(wc.qp_num, p.a->qp->qp_num);
		WANT(p.a->scq, 2, IBV_WC_WR_FLUSH_ERR);
		WANT(p.a->scq, 3, IBV_WC_WR_FLUSH_ERR);
		flushes(p.a);
	}
	sync_ends();
	if (p.b && t->remote != IBV_WC_SUCCESS) {
		struct ibv_wc wc = WAIT(p.b->rcq);

		EQ(wc.wr_id, 41);
		if (wc.status != t->remote_or || !t->remote_or)
			EQ(wc.status, t->remote);
		WANT(p.b->rcq, 42, IBV_WC_WR_FLUSH_ERR);
		flushes(p.b);
	}
	if (p.b) {
		ALL(p.b->buf, p.b->len, GUARD);
		MARGINS(p.b);
	}
	sync_ends();
	if (other.b)
		OK(post_receive(other.b, 7, 0, 64));
	sync_ends();
	if (other.a) {
		OK(post_op(other.a, IBV_WR_SEND, 7, 0, 64, 0, 0));
		WANT(other.a->scq, 7, IBV_WC_SUCCESS);
	}
	if (other.b)
		WANT(other.b->rcq, 7, IBV_WC_SUCCESS);
}

/* ---- remote access ----------------------------------------------------------------------------------------------- */

static void denied(struct trial t)
{
	t.status = t.status ? t.status : IBV_WC_REM_ACCESS_ERR;
	t.remote = IBV_WC_WR_FLUSH_ERR;
	run_trial(&t);
}
#define DENIED(...) denied((struct trial){ __VA_ARGS__ })

static void remote_key_wrong(void)
{
	DENIED(.op = IBV_WR_RDMA_WRITE, .rkey_xor = 1);
	DENIED(.op = IBV_WR_RDMA_WRITE, .rkey_xor = 0x10000);
	DENIED(.op = IBV_WR_RDMA_READ, .rkey_xor = 1);
	DENIED(.op = IBV_WR_ATOMIC_FETCH_AND_ADD, .rkey_xor = 1);
	/* the receive that the request would have taken: only flushed, or (soft-RoCE) taken with the error */
	DENIED(.op = IBV_WR_RDMA_WRITE_WITH_IMM, .rkey_xor = 1, .remote_or = IBV_WC_REM_ACCESS_ERR);
}

static void remote_bounds(void)
{
	DENIED(.op = IBV_WR_RDMA_WRITE, .remote_off = 4096 - 7);
	DENIED(.op = IBV_WR_RDMA_WRITE, .remote_off = 4096);
	DENIED(.op = IBV_WR_RDMA_WRITE, .remote_off = (size_t)-1);
	DENIED(.op = IBV_WR_RDMA_READ, .remote_off = 4096 - 7);
	DENIED(.op = IBV_WR_RDMA_READ, .remote_off = (size_t)-8);
	DENIED(.op = IBV_WR_ATOMIC_CMP_AND_SWP, .remote_off = 4096);
	/* the sum of address and length passes 2^64 */
	const struct end_cfg big = { .len = 16384 };
	DENIED(.op = IBV_WR_RDMA_WRITE, .a = &big, .len = 8192, .remote_off = (size_t)-4096);
}

static void remote_flags_missing_in_mr(void)
{
	const struct end_cfg write = { .mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
	const struct end_cfg read = { .mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC };
	const struct end_cfg at = { .mr_access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	const struct end_cfg none = { .mr_access = IBV_ACCESS_LOCAL_WRITE };

	DENIED(.op = IBV_WR_RDMA_WRITE, .b = &write);
	DENIED(.op = IBV_WR_RDMA_READ, .b = &read);
	DENIED(.op = IBV_WR_ATOMIC_FETCH_AND_ADD, .b = &at);
	DENIED(.op = IBV_WR_ATOMIC_CMP_AND_SWP, .b = &at);
	DENIED(.op = IBV_WR_RDMA_READ, .b = &none);
	DENIED(.op = IBV_WR_RDMA_WRITE, .b = &none);
}

/* The responder's QP does not allow the operation at all: an invalid request, whatever the key. */
static void remote_flags_missing_in_qp(void)
{
	const struct end_cfg write = { .qp_access = IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };
	const struct end_cfg read = { .qp_access = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC };
	const struct end_cfg at = { .qp_access = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ };
	enum ibv_wc_status s = IBV_WC_REM_INV_REQ_ERR;

	DENIED(.op = IBV_WR_RDMA_WRITE, .b = &write, .status = s);
	DENIED(.op = IBV_WR_RDMA_READ, .b = &read, .status = s);
	DENIED(.op = IBV_WR_ATOMIC_FETCH_AND_ADD, .b = &at, .status = s);
}

static void remote_mr_of_other_pd(void)
{
	enum { LEN = 16384 };
	uint8_t *buf = MADE(calloc(1, LEN));
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, LEN, ALL_ACCESS));

	DENIED(.op = IBV_WR_RDMA_WRITE, .target = mr);
	DENIED(.op = IBV_WR_RDMA_READ, .target = mr);
	DENIED(.op = IBV_WR_ATOMIC_FETCH_AND_ADD, .target = mr);
	ALL(buf, LEN, 0);
	OK(ibv_dereg_mr(mr));
	OK(ibv_dealloc_pd(pd));
	free(buf);
}

enum { READ_WRITE = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ }; /* static memory need not take atomics */

/* A key that was good, used before and after its end. */
static void remote_key_deregistered(void)
{
	struct pair p = pair_open(NULL, NULL);
	static uint8_t buf[4096];
	struct ibv_mr *mr = p.b ? MADE(ibv_reg_mr(p.b->pd, buf, sizeof(buf), READ_WRITE)) : NULL;
	uint64_t addr = from_b((uintptr_t)buf), rkey = from_b(mr ? mr->rkey : 0);

	if (p.a) {
		p.a->peer.addr = addr;
		p.a->peer.rkey = (uint32_t)rkey;
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 64, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_SUCCESS);
	}
	sync_ends();
	if (p.b) {
		OK(ibv_dereg_mr(mr));
		memset(buf, 0x33, sizeof(buf));
	}
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 64, 0, 0));
		WANT(p.a->scq, 2, IBV_WC_REM_ACCESS_ERR);
		flushes(p.a);
	}
	sync_ends();
	if (p.b)
		ALL(buf, sizeof(buf), 0x33);
}

/* A new registration of the same memory does not bring the old key back to life. */
static void remote_key_not_reused(void)
{
	static uint8_t buf[4096];
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	uint32_t seen[64];

	for (size_t i = 0; i < COUNT(seen); i++) {
		struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, sizeof(buf), READ_WRITE));

		seen[i] = mr->rkey;
		OK(ibv_dereg_mr(mr));
		for (size_t k = 0; k < i; k++)
			CHECK(seen[k] != seen[i], "key 0x%x came back after %zu registrations", seen[i], i - k);
	}
	OK(ibv_dealloc_pd(pd));
}

static void atomic_misaligned(void)
{
	if (is_rxe)
		skip_case("soft-RoCE's provider refuses the post itself, which no page names");
	/* IBA 9.4.5: an address that is not a multiple of 8 is an invalid request. */
	run_trial(&(struct trial){ .op = IBV_WR_ATOMIC_FETCH_AND_ADD, .remote_off = 4, .status = IBV_WC_REM_INV_REQ_ERR,
				   .remote = IBV_WC_WR_FLUSH_ERR });
	run_trial(&(struct trial){ .op = IBV_WR_ATOMIC_CMP_AND_SWP, .remote_off = 1, .status = IBV_WC_REM_INV_REQ_ERR,
				   .remote = IBV_WC_WR_FLUSH_ERR });
}

/* ---- local access ------------------------------------------------------------------------------------------------ */

/* soft-RoCE says LOC_QP_OP_ERR for a key that it does not find or that is another PD's. */
static enum ibv_wc_status bad_local_key(void)
{
	return is_rxe ? IBV_WC_LOC_QP_OP_ERR : IBV_WC_LOC_PROT_ERR;
}
#define LOCAL_ERROR(status_, ...) run_trial(&(struct trial){ .status = status_, __VA_ARGS__ })

static void local_key_wrong(void)
{
	LOCAL_ERROR(bad_local_key(), .op = IBV_WR_RDMA_WRITE, .lkey_xor = 0x5500);
	LOCAL_ERROR(bad_local_key(), .op = IBV_WR_SEND, .lkey_xor = 0x5500);
	LOCAL_ERROR(bad_local_key(), .op = IBV_WR_RDMA_WRITE, .lkey_xor = 1);
}

static void local_bounds(void)
{
	LOCAL_ERROR(IBV_WC_LOC_PROT_ERR, .op = IBV_WR_RDMA_WRITE, .off = 4096 - 7);
	LOCAL_ERROR(IBV_WC_LOC_PROT_ERR, .op = IBV_WR_SEND, .off = (size_t)-1);
	LOCAL_ERROR(IBV_WC_LOC_PROT_ERR, .op = IBV_WR_SEND, .off = 4096);
}

static void local_key_of_other_pd(void)
{
	struct ibv_pd *pd = MADE(ibv_alloc_pd(ctx));
	static uint8_t buf[64];
	struct ibv_mr *mr = MADE(ibv_reg_mr(pd, buf, sizeof(buf), READ_WRITE));
	struct pair p = pair_open(NULL, NULL);

	if (p.a) {
		struct ibv_sge s = { (uintptr_t)buf, 8, mr->lkey };
		struct ibv_send_wr w = { .wr_id = 1, .sg_list = &s, .num_sge = 1, .opcode = IBV_WR_RDMA_WRITE };

		w.wr.rdma.remote_addr = p.a->peer.addr;
		w.wr.rdma.rkey = p.a->peer.rkey;
		OK(post(p.a, &w, NULL));
		WANT(p.a->scq, 1, bad_local_key());
		flushes(p.a);
	}
	sync_ends();
	OK(ibv_dereg_mr(mr));
	OK(ibv_dealloc_pd(pd));
}

/* A read lands in local memory, which must have LOCAL_WRITE. */
static void read_into_readonly_mr(void)
{
	const struct end_cfg ro = { .mr_access = IBV_ACCESS_REMOTE_READ };

	LOCAL_ERROR(IBV_WC_LOC_PROT_ERR, .op = IBV_WR_RDMA_READ, .a = &ro);
	LOCAL_ERROR(IBV_WC_LOC_PROT_ERR, .op = IBV_WR_ATOMIC_FETCH_AND_ADD, .a = &ro);
}

/* ---- receives ---------------------------------------------------------------------------------------------------- */

/* IBA 9.7.5.2.4 answers with NAK-Invalid Request; soft-RoCE with NAK-Remote Operational Error, and LOC_QP_OP_ERR at the receiver. */
static void receive_too_small(void)
{
	run_trial(&(struct trial){ .op = IBV_WR_SEND, .len = 101, .recv_len = 100,
				   .status = is_rxe ? IBV_WC_REM_OP_ERR : IBV_WC_REM_INV_REQ_ERR,
				   .remote = is_rxe ? IBV_WC_LOC_QP_OP_ERR : IBV_WC_LOC_LEN_ERR });
}

static void receive_key_wrong(void)
{
	run_trial(&(struct trial){ .op = IBV_WR_SEND, .len = 64, .recv_first_lkey_bad = 1, .status = IBV_WC_REM_OP_ERR,
				   .remote = bad_local_key() });
}

static void receive_without_local_write(void)
{
	const struct end_cfg ro = { .mr_access = IBV_ACCESS_REMOTE_READ };

	run_trial(&(struct trial){ .op = IBV_WR_SEND, .len = 64, .b = &ro, .status = IBV_WC_REM_OP_ERR, .remote = bad_local_key() });
}

/* ---- nobody there, nothing posted -------------------------------------------------------------------------------- */

static void rnr_gives_up(void)
{
	for (int retries = 0; retries <= 3; retries += 3) {
		struct end_cfg a = { .rnr_retry = retries ? retries : NONE };
		struct pair p = pair_open(&a, NULL);

		if (p.a) {
			OK(post_op(p.a, IBV_WR_SEND, 1, 0, 8, 0, 0));
			OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 0, 0));
			WANT(p.a->scq, 1, IBV_WC_RNR_RETRY_EXC_ERR);
			WANT(p.a->scq, 2, IBV_WC_WR_FLUSH_ERR);
			flushes(p.a);
		}
		sync_ends();
		if (p.b) {
			EQ(qp_state(p.b->qp), IBV_QPS_RTS); /* the receiver did nothing wrong */
			ALL(p.b->buf, p.b->len, GUARD);
		}
	}
}

static void rnr_write_imm_gives_up(void)
{
	struct end_cfg a = { .rnr_retry = NONE };
	struct pair p = pair_open(&a, NULL);

	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE_WITH_IMM, 1, 0, 8, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_RNR_RETRY_EXC_ERR);
		flushes(p.a);
	}
	sync_ends();
}

struct late {
	struct end *b;
	size_t len;
};

static void *post_late(void *arg)
{
	struct late *l = arg;

	be_late();
	OK(post_receive(l->b, 5, 0, l->len));
	return NULL;
}

/* rnr_retry 7 waits for as long as it takes; the sender sleeps meanwhile and is woken. */
static void rnr_waits(void)
{
	for (size_t len = 64; len <= 1 << 20; len *= 128) {
		struct end_cfg c = { .with_channel = 1, .len = 1 << 20 };
		struct pair p = pair_open(&c, &c);
		struct late l = { p.b, len };
		pthread_t thread;

		if (p.a) {
			fill(p.a->buf, len, len);
			OK(post_op(p.a, IBV_WR_SEND, 4, 0, len, 0, 0));
		}
		sync_ends();
		if (p.b)
			EQ(pthread_create(&thread, NULL, post_late, &l), 0);
		if (p.a) {
			struct ibv_wc wc = SLEEP_FOR_WC(p.a->channel, p.a->scq);

			EQ(wc.wr_id, 4);
			EQ(wc.status, IBV_WC_SUCCESS);
		}
		if (p.b) {
			EQ(pthread_join(thread, NULL), 0);
			EQ(WANT(p.b->rcq, 5, IBV_WC_SUCCESS).byte_len, len);
			SAME(p.b->buf, len, len);
		}
	}
}

/* The order behind a waiting send is kept. */
static void rnr_keeps_order(void)
{
	struct pair p = pair_open(NULL, NULL);

	if (p.a) {
		memset(p.a->buf, 1, 64);
		OK(post_op(p.a, IBV_WR_SEND, 1, 0, 8, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 2048, 0));
		OK(post_op(p.a, IBV_WR_SEND, 3, 0, 16, 0, 0));
		be_late();
		EMPTY(p.a->scq);
	}
	sync_ends();
	if (p.b) {
		ALL(p.b->buf, p.b->len, GUARD);
		OK(post_receive(p.b, 11, 0, 64));
		OK(post_receive(p.b, 12, 64, 64));
		EQ(WANT(p.b->rcq, 11, IBV_WC_SUCCESS).byte_len, 8);
		EQ(WANT(p.b->rcq, 12, IBV_WC_SUCCESS).byte_len, 16);
		ALL(p.b->buf + 2048, 8, 1);
	}
	for (uint64_t i = 1; p.a && i <= 3; i++)
		WANT(p.a->scq, i, IBV_WC_SUCCESS);
}

/* Local ACK timeout 14 is 4.096 us * 2^14 = 67 ms; providers may take up to four times that, per try (IBA 9.7.6.1.3). */
static void peer_destroyed(void)
{
	struct end_cfg a = { .timeout = 14, .retry_cnt = 2 };
	struct pair p = pair_open(&a, NULL);

	if (p.b)
		end_destroy_qp(p.b);
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 0, 0));
		OK(post_op(p.a, IBV_WR_SEND, 2, 0, 8, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_RETRY_EXC_ERR);
		WANT(p.a->scq, 2, IBV_WC_WR_FLUSH_ERR);
		flushes(p.a);
	}
}

static void peer_in_reset(void)
{
	struct end_cfg a = { .timeout = 14, .retry_cnt = 1 };
	struct pair p = pair_create(&a, NULL);

	if (p.a) {
		end_connect(p.a);
		OK(post_op(p.a, IBV_WR_RDMA_READ, 1, 0, 8, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_RETRY_EXC_ERR);
		flushes(p.a);
	}
	sync_ends();
}

/* A peer whose QP has failed does not answer. */
static void peer_in_error(void)
{
	struct end_cfg a = { .timeout = 14, .retry_cnt = 1 };
	struct pair p = pair_open(&a, NULL);

	if (p.b) {
		OK(post_receive(p.b, 1, 0, 64));
		OK(qp_set_state(p.b->qp, IBV_QPS_ERR));
		WANT(p.b->rcq, 1, IBV_WC_WR_FLUSH_ERR);
	}
	sync_ends();
	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 0, 0));
		WANT(p.a->scq, 1, IBV_WC_RETRY_EXC_ERR);
		flushes(p.a);
	}
	sync_ends();
	if (p.b)
		ALL(p.b->buf, p.b->len, GUARD);
}

/* ---- flush ------------------------------------------------------------------------------------------------------- */

static void modify_to_error_flushes(void)
{
	struct pair p = pair_open(NULL, NULL);

	for (uint64_t i = 0; p.b && i < 10; i++)
		OK(post_receive(p.b, i, 0, 64));
	if (p.b) {
		OK(qp_set_state(p.b->qp, IBV_QPS_ERR));
		for (uint64_t i = 0; i < 10; i++)
			WANT(p.b->rcq, i, IBV_WC_WR_FLUSH_ERR);
		flushes(p.b);
	}
	sync_ends();
}

/* A send that waits for a receive is flushed too, and the peer's later receive does not get it, once nothing of it is on its way. */
static void modify_to_error_flushes_waiting_send(void)
{
	struct pair p = pair_open(NULL, NULL), behind = pair_open(NULL, NULL);

	if (behind.b)
		OK(post_receive(behind.b, 9, 0, 64));
	sync_ends();
	if (p.a) {
		for (uint64_t i = 0; i < 4; i++)
			OK(post_op(p.a, IBV_WR_SEND, i, 0, 64, 0, 0));
		OK(qp_set_state(p.a->qp, IBV_QPS_ERR));
		for (uint64_t i = 0; i < 4; i++)
			WANT(p.a->scq, i, IBV_WC_WR_FLUSH_ERR);
		flushes(p.a);
		OK(post_op(behind.a, IBV_WR_SEND, 9, 0, 64, 0, 0));
		WANT(behind.a->scq, 9, IBV_WC_SUCCESS);
	}
	if (behind.b)
		WANT(behind.b->rcq, 9, IBV_WC_SUCCESS);
	sync_ends();
	if (p.b) {
		OK(post_receive(p.b, 1, 0, 64));
		be_late();
		EMPTY(p.b->rcq);
		ALL(p.b->buf, p.b->len, GUARD);
	}
}

static void unsignalled_failure_completes(void)
{
	struct end_cfg a = { .unsignalled = 1 };
	struct pair p = pair_open(&a, NULL);

	if (p.a) {
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 1, 0, 8, 0, 0));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 2, 0, 8, 4096, 0));
		OK(post_op(p.a, IBV_WR_RDMA_WRITE, 3, 0, 8, 0, 0));
		WANT(p.a->scq, 2, IBV_WC_REM_ACCESS_ERR);
		WANT(p.a->scq, 3, IBV_WC_WR_FLUSH_ERR);
		flushes(p.a);
	}
	sync_ends();
}

/* After RESET the same QPs, connected anew, work; completions of the old life do not appear. */
static void reset_and_reconnect(void)
{
	struct pair p = pair_open(NULL, NULL);
	struct end *both[2] = { p.a, p.b };

	for (uint64_t turn = 1; turn <= 3; turn++) {
		if (p.b)
			OK(post_receive(p.b, turn, 0, 64));
		sync_ends();
		if (p.a) {
			fill(p.a->buf, 64, turn);
			OK(post_op(p.a, IBV_WR_SEND, turn, 0, 64, 0, 0));
			WANT(p.a->scq, turn, IBV_WC_SUCCESS);
		}
		if (p.b) {
			WANT(p.b->rcq, turn, IBV_WC_SUCCESS);
			SAME(p.b->buf, 64, turn);
			OK(post_receive(p.b, 99, 0, 64)); /* lost in the reset, silently */
		}
		sync_ends();
		for (int i = 0; i < 2; i++)
			if (both[i])
				OK(qp_set_state(both[i]->qp, IBV_QPS_RESET));
		sync_ends();
		for (int i = 0; i < 2; i++)
			if (both[i]) {
				EMPTY(both[i]->scq);
				EMPTY(both[i]->rcq);
				end_connect(both[i]);
			}
		sync_ends();
	}
}

#define CASE(name) { #name, name, 0 }
static const struct test_case cases[] = {
	CASE(remote_key_wrong),
	CASE(remote_bounds),
	CASE(remote_flags_missing_in_mr),
	CASE(remote_flags_missing_in_qp),
	CASE(remote_mr_of_other_pd),
	CASE(remote_key_deregistered),
	{ "remote_key_not_reused", remote_key_not_reused, LOCAL },
	CASE(atomic_misaligned),
	CASE(local_key_wrong),
	CASE(local_bounds),
	CASE(local_key_of_other_pd),
	CASE(read_into_readonly_mr),
	CASE(receive_too_small),
	CASE(receive_key_wrong),
	CASE(receive_without_local_write),
	CASE(rnr_gives_up),
	CASE(rnr_write_imm_gives_up),
	CASE(rnr_waits),
	CASE(rnr_keeps_order),
	CASE(peer_destroyed),
	CASE(peer_in_reset),
	CASE(peer_in_error),
	CASE(modify_to_error_flushes),
	CASE(modify_to_error_flushes_waiting_send),
	CASE(unsignalled_failure_completes),
	CASE(reset_and_reconnect),
};
SUITE(cases)
