/*
 * What every conformance program shares: options, the two roles, checks, the out-of-band channel, a deterministic
 * source of data, and a pair of connected queue pairs.  It knows the public verbs API and nothing of who provides it.
 *
 * A program is a table of cases.  A case is straight-line code run by every process of the test:
 *
 *     --self                 one process, one thread, is both A (requester) and B (responder)
 *     --server PORT          this process is B
 *     --client ADDR:PORT     this process is A
 *
 * so `if (is_a) post(...); sync_ends(); if (is_b) wait_wc(...)` means the same in each mode, as long as no step waits
 * for something that a later step does.
 */
#ifndef FREEFLOW_CONFORMANCE_COMMON_H
#define FREEFLOW_CONFORMANCE_COMMON_H

#include <errno.h>
#include <infiniband/verbs.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- cases and roles -------------------------------------------------------------------------------------------- */

enum {
	LOCAL = 1, /* needs no peer: every process runs it on its own */
};

struct test_case {
	const char *name;
	void (*run)(void);
	int flags;
};

int suite_main(int argc, char **argv, const struct test_case *cases, size_t count);
#define SUITE(cases)                                                                                                    \
	int main(int argc, char **argv)                                                                                 \
	{                                                                                                               \
		return suite_main(argc, argv, cases, sizeof(cases) / sizeof((cases)[0]));                               \
	}

extern bool is_a, is_b;		 /* both in --self */
extern struct ibv_device **devices; /* NULL-terminated, as ibv_get_device_list gave it */
extern struct ibv_context *ctx;
extern struct ibv_device_attr dev_attr;
extern struct ibv_port_attr port_attr;
extern union ibv_gid own_gid;
extern int gid_index;
extern uint8_t port_num;
extern uint64_t seed;
/* Set for the kernel's soft-RoCE: the known departures from the specification are tolerated, each where it is met. */
extern bool is_rxe;
#define MULTI_PROCESS (!(is_a && is_b))

/* ---- checks: each ends the case in this process, and at its next rendezvous in the other ------------------------- */

_Noreturn void fail_at(const char *file, int line, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
_Noreturn void skip_case(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
#define FAIL(...) fail_at(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(cond, ...)                                                                                                \
	do {                                                                                                            \
		if (!(cond))                                                                                            \
			fail_at(__FILE__, __LINE__, "expected " #cond "; " __VA_ARGS__);                                \
	} while (0)

void eq_at(const char *file, int line, const char *what, long long got, long long want);
#define EQ(got, want) eq_at(__FILE__, __LINE__, #got, (long long)(got), (long long)(want))
/* For calls that return an errno value (0 is success). */
void rc_at(const char *file, int line, const char *what, int got, int want);
#define OK(call) rc_at(__FILE__, __LINE__, #call, (call), 0)
#define RC(call, want) rc_at(__FILE__, __LINE__, #call, (call), (want))
/* For creators: a pointer, or NULL with errno. */
void *made_at(const char *file, int line, const char *what, void *object);
#define MADE(call) made_at(__FILE__, __LINE__, #call, (call))
#define NOT_MADE(call, want)                                                                                            \
	do {                                                                                                            \
		errno = 0;                                                                                              \
		void *made_ = (call);                                                                                   \
		not_made_at(__FILE__, __LINE__, #call, made_, errno, want);                                             \
	} while (0)
void not_made_at(const char *file, int line, const char *what, const void *object, int got, int want);

/* ---- out of band: framed messages over one TCP connection; nothing in --self ------------------------------------- */

void sync_ends(void);
void swap_bytes(const void *mine, void *theirs, size_t len); /* two processes only */
uint64_t from_a(uint64_t value);			     /* A's value, in both */
uint64_t from_b(uint64_t value);
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

/* ---- data ---------------------------------------------------------------------------------------------------------*/

uint64_t next_random(uint64_t *state);
void fill(void *buf, size_t len, uint64_t stream); /* bytes that depend on seed and stream alone */
bool same(const void *buf, size_t len, uint64_t stream);
void same_at(const char *file, int line, const void *buf, size_t len, uint64_t stream);
#define SAME(buf, len, stream) same_at(__FILE__, __LINE__, buf, len, stream)
void all_at(const char *file, int line, const void *buf, size_t len, uint8_t byte);
#define ALL(buf, len, byte) all_at(__FILE__, __LINE__, buf, len, byte)

/* ---- ends and pairs ---------------------------------------------------------------------------------------------- */

enum { GUARD = 0xA7, ALL_ACCESS = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC };

/* Zero means the default in brackets; NONE means a real zero. */
enum { NONE = -1 };
struct end_cfg {
	enum ibv_qp_type type; /* [RC] */
	int send_wr, recv_wr;  /* [64] */
	int send_sge, recv_sge; /* [1] */
	int inline_data;	/* [0] */
	int cqe;		/* [256] */
	int unsignalled;	/* sq_sig_all = 0 [sq_sig_all = 1] */
	int with_channel;	/* both CQs on one completion channel */
	int one_cq;		/* send and receive completions on one CQ */
	int mr_access, qp_access; /* [ALL_ACCESS] */
	int timeout, retry_cnt, rnr_retry, min_rnr_timer; /* [16, 7, 7, 12] */
	int rd_atomic;				 /* [1] */
	uint64_t send_ops; /* made with ibv_create_qp_ex, posted to with ibv_wr_* */
	struct ibv_cq *cq; /* share this CQ for both queues */
	struct ibv_pd *pd; /* share this PD */
	struct ibv_srq *srq; /* take receives from this queue */
	size_t len;	   /* bytes in buf [4096] */
};

struct end_info {
	uint32_t qpn, psn, rkey, spare;
	uint64_t addr, len;
	uint8_t gid[16];
};

struct end {
	struct end_cfg cfg;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq *scq, *rcq;
	struct ibv_qp *qp;
	struct ibv_qp_ex *qpx;
	struct ibv_mr *mr;
	struct ibv_ah *ah; /* UD: to the other end */
	uint8_t *buf;	   /* len bytes of GUARD between two margins of GUARD */
	uint8_t *raw;
	size_t len;
	struct end_info me, peer;
	bool used;
};

enum { UD_QKEY = 0x11111111, MARGIN = 192 };

struct pair {
	struct end *a, *b; /* NULL where that end is in the other process */
};

/* Opens the ends this process has, connects them, and rendezvous.  Everything is given back when the case ends. */
struct pair pair_open(const struct end_cfg *a, const struct end_cfg *b);
struct pair pair_create(const struct end_cfg *a, const struct end_cfg *b); /* both QPs stay in RESET */
struct pair pair_loopback(const struct end_cfg *a, const struct end_cfg *b); /* both ends in this process, whatever the mode; RESET */
void end_destroy(struct end *e);					    /* now, not at the end of the case */
void end_destroy_qp(struct end *e);
void end_connect(struct end *e); /* RESET -> RTS towards e->peer */
int qp_init(struct end *e);
int qp_rtr(struct end *e);
int qp_rts(struct end *e);
enum ibv_qp_state qp_state(struct ibv_qp *qp);
int qp_set_state(struct ibv_qp *qp, enum ibv_qp_state state);
struct ibv_qp_init_attr qp_init_attr(const struct end_cfg *cfg, struct ibv_cq *scq, struct ibv_cq *rcq);
void margins_at(const char *file, int line, const struct end *e);
#define MARGINS(e) margins_at(__FILE__, __LINE__, e)
void reset_buf(struct end *e); /* GUARD everywhere */

/* ---- work -------------------------------------------------------------------------------------------------------- */

struct ibv_sge sge(const struct end *e, size_t off, size_t len);
/* Posts a chain by whichever interface the end was made for. */
int post(struct end *e, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
bool is_atomic(enum ibv_wr_opcode op);
/* One entry; for UD to the peer; for an atomic, compare_add is 1 and swap 0. */
int post_op(struct end *e, enum ibv_wr_opcode op, uint64_t wr_id, size_t off, size_t len, size_t remote_off, int flags);
int post_receive(struct end *e, uint64_t wr_id, size_t off, size_t len);

/*
 * FLUSH (IBA annex A19) came with rdma-core 45: what Debian 12's headers lack, under names of our own. With newer headers
 * (HAVE_WR_FLUSH) the compiler compares them, and the call is that release's inline function.
 */
enum {
	WR_FLUSH = 14,
	WC_FLUSH = 8,
	QP_EX_WITH_FLUSH = 1 << 11,
	ACCESS_FLUSH_GLOBAL = 1 << 8,
	ACCESS_FLUSH_PERSISTENT = 1 << 9,
	FLUSH_GLOBAL = 1, /* placement types */
	FLUSH_PERSISTENT = 2,
	FLUSH_RANGE = 0, /* selectivity levels */
	FLUSH_MR = 1,
};
void wr_flush(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, size_t len, uint8_t placement, uint8_t level);

double now(void);
struct ibv_wc wait_at(const char *file, int line, struct ibv_cq *cq);
#define WAIT(cq) wait_at(__FILE__, __LINE__, cq)
struct ibv_wc want_at(const char *file, int line, struct ibv_cq *cq, uint64_t wr_id, enum ibv_wc_status status);
#define WANT(cq, wr_id, status) want_at(__FILE__, __LINE__, cq, wr_id, status)
void empty_at(const char *file, int line, struct ibv_cq *cq);
#define EMPTY(cq) empty_at(__FILE__, __LINE__, cq)
/* Blocks (never polls) until the channel has an event, and acknowledges it. */
struct ibv_cq *event_at(const char *file, int line, struct ibv_comp_channel *channel);
#define EVENT(channel) event_at(__FILE__, __LINE__, channel)
/* Arms, polls, and only then sleeps: the loop of every event-driven program. */
struct ibv_wc sleep_for_wc_at(const char *file, int line, struct ibv_comp_channel *channel, struct ibv_cq *cq);
#define SLEEP_FOR_WC(channel, cq) sleep_for_wc_at(__FILE__, __LINE__, channel, cq)
void be_late(void); /* lets time pass where the lateness itself is what is tested */

#endif
