/* A signal interrupts a wait for a completion event as it does read(2): not if its handler was set with SA_RESTART. */
#include "pair.h"
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <unistd.h>

static volatile sig_atomic_t ticks;

static void tick(int number)
{
	(void)number;
	ticks++;
}

static void tick_every_ms(int flags)
{
	struct sigaction action = { .sa_handler = tick, .sa_flags = flags };
	struct itimerval ms = { { 0, 1000 }, { 0, 1000 } };
	CHECK(sigaction(SIGALRM, &action, NULL) == 0);
	CHECK(setitimer(ITIMER_REAL, &ms, NULL) == 0);
}

/* Sends once the waiting thread was interrupted a few times. */
static void *send_later(void *arg)
{
	struct pair *p = arg;
	struct ibv_sge sge = { (uintptr_t)p->buffer, 8, p->mr->lkey };
	struct ibv_send_wr wr = { .sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND }, *bad;
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	int before = ticks;
	while (ticks < before + 20)
		usleep(1000);
	CHECK(ibv_post_send(p->qp[0], &wr, &bad) == 0);
	return NULL;
}

int main(void)
{
	struct pair p = make_pair(0, open_first(), NULL);
	struct ibv_cq *cq;
	void *user;
	pthread_t thread;

	tick_every_ms(SA_RESTART);
	post_receive(&p, 1, 0, 64);
	CHECK(ibv_req_notify_cq(p.rcq, 0) == 0);
	CHECK(pthread_create(&thread, NULL, send_later, &p) == 0);
	CHECK(ibv_get_cq_event(p.channel, &cq, &user) == 0 && cq == p.rcq);
	ibv_ack_cq_events(cq, 1);
	CHECK(pthread_join(thread, NULL) == 0);

	tick_every_ms(0);
	CHECK(ibv_get_cq_event(p.channel, &cq, &user) == -1 && errno == EINTR);
	return 0;
}
