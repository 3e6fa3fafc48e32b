/* RC: an end is taken away or fails while the other, or another thread, is in the middle of something. */
#include "common.h"

#include <pthread.h>

enum { BIG = 32 << 20 }; /* more than any provider moves in one post */

static const struct end_cfg big = { .len = BIG, .timeout = 10, .retry_cnt = 1 };

/* A's send of BIG bytes has begun to fill B's first receive, or has not yet, or has ended: nobody can tell. */
static struct pair begin_to_send(void)
{
	struct pair p = pair_open(&big, &big);

	if (p.b) {
		OK(post_receive(p.b, 1, 0, BIG));
		OK(post_receive(p.b, 2, 0, 64));
	}
	if (p.a)
		fill(p.a->buf, BIG, 1);
	sync_ends();
	if (p.a)
		OK(post_op(p.a, IBV_WR_SEND, 9, 0, BIG, 0, 0));
	return p;
}

/* In ERR every receive comes back, also the one that was being filled, and what came back is not written to any more. */
static void receives_come_back(struct end *e)
{
	OK(qp_set_state(e->qp, IBV_QPS_ERR));
	struct ibv_wc wc = WAIT(e->rcq);

	EQ(wc.wr_id, 1);
	if (wc.status == IBV_WC_SUCCESS)
		SAME(e->buf, BIG, 1);
	else
		EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
	reset_buf(e);
	WANT(e->rcq, 2, IBV_WC_WR_FLUSH_ERR);
	be_late();
	ALL(e->buf, e->len, GUARD);
}

static void receiver_fails_midway(void)
{
	struct pair p = begin_to_send();

	if (p.b)
		receives_come_back(p.b);
	sync_ends();
	if (p.a) {
		struct ibv_wc wc = WAIT(p.a->scq);

		if (wc.status != IBV_WC_SUCCESS)
			EQ(wc.status, IBV_WC_RETRY_EXC_ERR);
	}
}

static void sender_fails_midway(void)
{
	struct pair p = begin_to_send();

	if (p.a) {
		OK(qp_set_state(p.a->qp, IBV_QPS_ERR));
		struct ibv_wc wc = WAIT(p.a->scq);

		if (wc.status != IBV_WC_SUCCESS)
			EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
	}
	sync_ends();
	if (p.b)
		receives_come_back(p.b);
}

static void sender_goes_midway(void)
{
	struct pair p = begin_to_send();

	if (p.a)
		end_destroy_qp(p.a);
	sync_ends();
	if (p.b)
		receives_come_back(p.b);
}

static void *fail_late(void *arg)
{
	struct end *e = arg;

	be_late();
	OK(qp_set_state(e->qp, IBV_QPS_ERR));
	return NULL;
}

/* A send that sleeps until a receive is posted (rnr_retry 7) is not left sleeping by a receiver that fails instead. */
static void receiver_fails_before_it_posts(void)
{
	struct end_cfg c = { .with_channel = 1, .timeout = 10, .retry_cnt = 1 };
	struct pair p = pair_open(&c, &c);
	pthread_t thread;

	if (p.a)
		OK(post_op(p.a, IBV_WR_SEND, 4, 0, 64, 0, 0));
	sync_ends();
	if (p.b)
		EQ(pthread_create(&thread, NULL, fail_late, p.b), 0);
	if (p.a) {
		struct ibv_wc wc = SLEEP_FOR_WC(p.a->channel, p.a->scq);

		EQ(wc.wr_id, 4);
		EQ(wc.status, IBV_WC_RETRY_EXC_ERR);
	}
	if (p.b)
		EQ(pthread_join(thread, NULL), 0);
}

static void *post_one(void *arg)
{
	OK(post_op(arg, IBV_WR_SEND, 1, 0, 64, 0, 0));
	return NULL;
}

/* Sends to a peer that is not there, while another thread moves the QP to ERR: each ends, and nobody waits for the other. */
static void modify_against_post(void)
{
	struct pair p = pair_loopback(NULL, NULL);

	for (int i = 0; i < 200; i++) {
		pthread_t thread;

		end_connect(p.a);
		EQ(pthread_create(&thread, NULL, post_one, p.a), 0);
		for (uint64_t spin = next_random(&seed) % 200000; spin; spin--)
			__asm__ volatile("");
		OK(qp_set_state(p.a->qp, IBV_QPS_ERR));
		EQ(pthread_join(thread, NULL), 0);
		EQ(WANT(p.a->scq, 1, IBV_WC_WR_FLUSH_ERR).qp_num, p.a->qp->qp_num);
		EMPTY(p.a->scq);
		OK(qp_set_state(p.a->qp, IBV_QPS_RESET));
	}
}

static const struct test_case cases[] = {
	{ "receiver_fails_midway", receiver_fails_midway, 0 },
	{ "sender_fails_midway", sender_fails_midway, 0 },
	{ "sender_goes_midway", sender_goes_midway, 0 },
	{ "receiver_fails_before_it_posts", receiver_fails_before_it_posts, 0 },
	{ "modify_against_post", modify_against_post, LOCAL },
};
SUITE(cases)
