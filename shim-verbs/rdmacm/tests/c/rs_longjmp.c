/* A signal handler leaves a call for good by longjmp(3), wherever it was, and the program calls again and closes: nothing waits
 * for ever. iperf3 ends that way. A process for each round: a call that was left while it spoke with the router takes that
 * connection along, and what needs the router afterwards cannot go on. */
#include "rs.h"
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

enum { ROUNDS = 40, LEN = 1 << 20 };

static sigjmp_buf out;
static char buf[LEN];

static void leave(int signal)
{
	(void)signal;
	siglongjmp(out, 1);
}

/* The time of a round differs, so that calls are left in different places. */
static void ring_in(int micros)
{
	struct itimerval timer = { .it_value = { .tv_usec = micros } };
	CHECK(setitimer(ITIMER_REAL, &timer, NULL) == 0);
}

static void *drain(void *arg)
{
	static char sink[LEN];

	while (rrecv(*(int *)arg, sink, LEN, 0) > 0)
		;
	return NULL;
}

static void leave_a_send(int micros)
{
	static int pair[2];
	sigset_t alarms;
	pthread_t thread;

	rs_pair(pair);
	CHECK(sigemptyset(&alarms) == 0 && sigaddset(&alarms, SIGALRM) == 0);
	CHECK(pthread_sigmask(SIG_BLOCK, &alarms, NULL) == 0);
	CHECK(pthread_create(&thread, NULL, drain, &pair[1]) == 0);
	CHECK(pthread_sigmask(SIG_UNBLOCK, &alarms, NULL) == 0);
	if (sigsetjmp(out, 1) == 0) {
		ring_in(micros);
		for (;;)
			CHECK(rsend(pair[0], buf, LEN, 0) > 0);
	}
	/* It may work as ever or say EIO, as the place has it; closing works in any case. */
	ssize_t sent = rsend(pair[0], buf, 1, 0);
	CHECK(sent == 1 || (sent == -1 && errno == EIO));
	CHECK(sent == 1 || rs_ready(pair[0], POLLOUT, 0) & POLLERR);
	CHECK(rclose(pair[0]) == 0);
	if (sent == 1)
		CHECK(pthread_join(thread, NULL) == 0);
}

static void leave_a_wait(void)
{
	static int pair[2];

	rs_pair(pair);
	if (sigsetjmp(out, 1) == 0) {
		ring_in(2000);
		rrecv(pair[0], buf, LEN, 0);
		CHECK(!"nobody sends");
	}
	CHECK(rsend(pair[1], "x", 1, 0) == 1);
	CHECK(rrecv(pair[0], buf, LEN, 0) == 1 && buf[0] == 'x');
	CHECK(rclose(pair[0]) == 0 && rclose(pair[1]) == 0);
}

int main(void)
{
	for (int i = 0; i <= ROUNDS; i++) {
		int status;
		pid_t child = fork();

		CHECK(child >= 0);
		if (!child) {
			CHECK(signal(SIGALRM, leave) != SIG_ERR);
			if (i == 0)
				leave_a_wait();
			else
				leave_a_send(500 + 137 * i);
			_exit(0);
		}
		CHECK(waitpid(child, &status, 0) == child && status == 0);
	}
	return 0;
}
