/* Posting by either interface, and waiting for completions. */
#include "common.h"
#include "internal.h"

#include <poll.h>
#include <sched.h>
#include <time.h>

struct ibv_sge sge(const struct end *e, size_t off, size_t len)
{
	return (struct ibv_sge){ .addr = (uintptr_t)e->buf + off, .length = (uint32_t)len, .lkey = e->mr->lkey };
}

/* ---- the ibv_wr_* interface, driven by an ibv_send_wr ------------------------------------------------------------ */

static void wr_op(struct ibv_qp_ex *q, const struct ibv_send_wr *w)
{
	switch (w->opcode) {
	case IBV_WR_SEND: ibv_wr_send(q); break;
	case IBV_WR_SEND_WITH_IMM: ibv_wr_send_imm(q, w->imm_data); break;
	case IBV_WR_RDMA_WRITE: ibv_wr_rdma_write(q, w->wr.rdma.rkey, w->wr.rdma.remote_addr); break;
	case IBV_WR_RDMA_WRITE_WITH_IMM: ibv_wr_rdma_write_imm(q, w->wr.rdma.rkey, w->wr.rdma.remote_addr, w->imm_data); break;
	case IBV_WR_RDMA_READ: ibv_wr_rdma_read(q, w->wr.rdma.rkey, w->wr.rdma.remote_addr); break;
	case IBV_WR_ATOMIC_CMP_AND_SWP:
		ibv_wr_atomic_cmp_swp(q, w->wr.atomic.rkey, w->wr.atomic.remote_addr, w->wr.atomic.compare_add, w->wr.atomic.swap);
		break;
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
		ibv_wr_atomic_fetch_add(q, w->wr.atomic.rkey, w->wr.atomic.remote_addr, w->wr.atomic.compare_add);
		break;
	default: FAIL("no ibv_wr_* for opcode %d here", w->opcode);
	}
}

static void wr_data(struct ibv_qp_ex *q, const struct ibv_send_wr *w)
{
	struct ibv_data_buf bufs[32];

	if (!(w->send_flags & IBV_SEND_INLINE)) {
		if (w->num_sge == 1)
			ibv_wr_set_sge(q, w->sg_list->lkey, w->sg_list->addr, w->sg_list->length);
		else
			ibv_wr_set_sge_list(q, (size_t)w->num_sge, w->sg_list);
		return;
	}
	for (int i = 0; i < w->num_sge; i++)
		bufs[i] = (struct ibv_data_buf){ (void *)(uintptr_t)w->sg_list[i].addr, w->sg_list[i].length };
	if (w->num_sge == 1)
		ibv_wr_set_inline_data(q, bufs->addr, bufs->length);
	else
		ibv_wr_set_inline_data_list(q, (size_t)w->num_sge, bufs);
}

static int post_ex(struct end *e, const struct ibv_send_wr *wr)
{
	/* The setter alone makes data inline (man ibv_wr_post); soft-RoCE's provider wants the flag as well. */
	unsigned keep = is_rxe ? ~0u : ~(unsigned)IBV_SEND_INLINE;

	ibv_wr_start(e->qpx);
	for (; wr; wr = wr->next) {
		e->qpx->wr_id = wr->wr_id;
		e->qpx->wr_flags = wr->send_flags & keep;
		wr_op(e->qpx, wr);
		if (e->cfg.type == IBV_QPT_UD)
			ibv_wr_set_ud_addr(e->qpx, wr->wr.ud.ah, wr->wr.ud.remote_qpn, wr->wr.ud.remote_qkey);
		wr_data(e->qpx, wr);
	}
	return ibv_wr_complete(e->qpx);
}

int post(struct end *e, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct ibv_send_wr *unused;

	if (e->qpx)
		return post_ex(e, wr);
	return ibv_post_send(e->qp, wr, bad ? bad : &unused);
}

bool is_atomic(enum ibv_wr_opcode op)
{
	return op == IBV_WR_ATOMIC_CMP_AND_SWP || op == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

int post_op(struct end *e, enum ibv_wr_opcode op, uint64_t wr_id, size_t off, size_t len, size_t remote_off, int flags)
{
	struct ibv_sge s = sge(e, off, len);
	struct ibv_send_wr w = { .wr_id = wr_id, /* a length of 0 in an entry means 2^31 on some hardware: no bytes is no entry */
				.sg_list = &s, .num_sge = len ? 1 : 0, .opcode = op, .send_flags = (unsigned)flags };

	if (e->cfg.type == IBV_QPT_UD) {
		w.wr.ud.ah = e->ah;
		w.wr.ud.remote_qpn = e->peer.qpn;
		w.wr.ud.remote_qkey = UD_QKEY;
	} else if (is_atomic(op)) {
		w.wr.atomic.remote_addr = e->peer.addr + remote_off;
		w.wr.atomic.rkey = e->peer.rkey;
		w.wr.atomic.compare_add = 1;
	} else {
		w.wr.rdma.remote_addr = e->peer.addr + remote_off;
		w.wr.rdma.rkey = e->peer.rkey;
	}
	return post(e, &w, NULL);
}

int post_receive(struct end *e, uint64_t wr_id, size_t off, size_t len)
{
	struct ibv_sge s = sge(e, off, len);
	struct ibv_recv_wr w = { .wr_id = wr_id, .sg_list = &s, .num_sge = len ? 1 : 0 }, *bad;

	return ibv_post_recv(e->qp, &w, &bad);
}

void wr_flush(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, size_t len, uint8_t placement, uint8_t level)
{
#ifdef HAVE_WR_FLUSH
	_Static_assert((int)WR_FLUSH == IBV_WR_FLUSH && (int)WC_FLUSH == IBV_WC_FLUSH && (int)QP_EX_WITH_FLUSH == IBV_QP_EX_WITH_FLUSH &&
			       (int)ACCESS_FLUSH_GLOBAL == IBV_ACCESS_FLUSH_GLOBAL &&
			       (int)ACCESS_FLUSH_PERSISTENT == IBV_ACCESS_FLUSH_PERSISTENT && (int)FLUSH_GLOBAL == IBV_FLUSH_GLOBAL &&
			       (int)FLUSH_PERSISTENT == IBV_FLUSH_PERSISTENT && (int)FLUSH_RANGE == IBV_FLUSH_RANGE &&
			       (int)FLUSH_MR == IBV_FLUSH_MR,
		       "this release's numbers");
	ibv_wr_flush(q, rkey, addr, len, placement, level);
#else
	/* The function behind the last one that rdma-core 44 knows. */
	void (*function)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);

	memcpy(&function, (char *)q + offsetof(struct ibv_qp_ex, wr_atomic_write) + sizeof(q->wr_atomic_write), sizeof(function));
	function(q, rkey, addr, len, placement, level);
#endif
}

/* ---- waiting ----------------------------------------------------------------------------------------------------- */

struct ibv_wc wait_at(const char *file, int line, struct ibv_cq *cq)
{
	struct ibv_wc wc;
	double until = 0;

	memset(&wc, 0x5a, sizeof(wc));
	for (unsigned spins = 1;; spins++) {
		int n = ibv_poll_cq(cq, 1, &wc);

		if (n == 1)
			return wc;
		if (n < 0)
			fail_at(file, line, "ibv_poll_cq: expected 0 or 1, got %d", n);
		if (spins % 64)
			continue;
		sched_yield();
		if (spins % 4096)
			continue;
		until = until ? until : now() + 10 * patience;
		if (now() > until)
			fail_at(file, line, "expected a completion, got none");
		if (oob_peer_gave_up())
			fail_at(file, line, "expected a completion, but the other process has given up");
	}
}

struct ibv_wc want_at(const char *file, int line, struct ibv_cq *cq, uint64_t wr_id, enum ibv_wc_status status)
{
	struct ibv_wc wc = wait_at(file, line, cq);

	if (wc.status != status || wc.wr_id != wr_id)
		fail_at(file, line, "expected wr_id %" PRIu64 " with '%s', got wr_id %" PRIu64 " with '%s' (vendor_err 0x%x)", wr_id,
			ibv_wc_status_str(status), wc.wr_id, ibv_wc_status_str(wc.status), wc.vendor_err);
	return wc;
}

void empty_at(const char *file, int line, struct ibv_cq *cq)
{
	struct ibv_wc wc;
	int n = ibv_poll_cq(cq, 1, &wc);

	if (n)
		fail_at(file, line, "expected an empty CQ, got %d, wr_id %" PRIu64 " '%s'", n, n > 0 ? wc.wr_id : 0,
			n > 0 ? ibv_wc_status_str(wc.status) : "");
}

static void wait_readable(const char *file, int line, int fd)
{
	struct pollfd p = { .fd = fd, .events = POLLIN };
	int n = poll(&p, 1, (int)(10000 * patience));

	if (n != 1)
		fail_at(file, line, "expected an event, got poll() = %d", n);
}

struct ibv_cq *event_at(const char *file, int line, struct ibv_comp_channel *channel)
{
	struct ibv_cq *cq = NULL;
	void *cq_context = NULL;

	wait_readable(file, line, channel->fd);
	if (ibv_get_cq_event(channel, &cq, &cq_context))
		fail_at(file, line, "ibv_get_cq_event: %s", strerror(errno));
	if (!cq || cq_context != cq->cq_context)
		fail_at(file, line, "expected the CQ's own context %p, got %p", cq ? cq->cq_context : NULL, cq_context);
	ibv_ack_cq_events(cq, 1);
	return cq;
}

struct ibv_wc sleep_for_wc_at(const char *file, int line, struct ibv_comp_channel *channel, struct ibv_cq *cq)
{
	struct ibv_wc wc;

	for (;;) {
		OK(ibv_req_notify_cq(cq, 0));
		int n = ibv_poll_cq(cq, 1, &wc);

		if (n < 0)
			fail_at(file, line, "ibv_poll_cq: %d", n);
		if (n)
			return wc;
		while (event_at(file, line, channel) != cq)
			;
	}
}

void be_late(void)
{
	nanosleep(&(struct timespec){ .tv_nsec = (long)(20000000 * patience) % 1000000000 }, NULL);
}
