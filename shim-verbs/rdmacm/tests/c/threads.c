/* A thread blocked in rdma_get_cm_event: it can be cancelled, a signal interrupts it, and it outlives its channel. */
#include "cm.h"
#include <signal.h>
#include <sys/syscall.h>

static volatile pid_t tid;
static volatile int returned;

static void *wait_for_event(void *channel)
{
	struct rdma_cm_event *event;
	tid = syscall(SYS_gettid);
	int got = rdma_get_cm_event(channel, &event);
	returned = got == -1 ? errno : -1;
	return NULL;
}

/* Until the thread sleeps in the kernel: its state in /proc is S. */
static void until_asleep(void)
{
	char path[64], state = 0;
	do {
		snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
		FILE *stat = tid ? fopen(path, "r") : NULL;
		if (stat) {
			CHECK(fscanf(stat, "%*d %*s %c", &state) == 1);
			fclose(stat);
		}
		sched_yield();
	} while (state != 'S');
}

static pthread_t start(struct rdma_event_channel *channel)
{
	pthread_t thread;
	tid = 0;
	returned = 0;
	CHECK(pthread_create(&thread, NULL, wait_for_event, channel) == 0);
	until_asleep();
	return thread;
}

static void nothing(int signal)
{
	(void)signal;
}

int main(void)
{
	struct rdma_event_channel *channel = rdma_create_event_channel();
	struct sigaction action = { .sa_handler = nothing };
	void *result;
	CHECK(channel);

	pthread_t thread = start(channel);
	CHECK(pthread_cancel(thread) == 0);
	CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);

	CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
	thread = start(channel);
	CHECK(pthread_kill(thread, SIGUSR1) == 0);
	CHECK(pthread_join(thread, NULL) == 0 && returned == EINTR);

	thread = start(channel);
	rdma_destroy_event_channel(channel);
	until_asleep();
	CHECK(returned == 0);
	CHECK(pthread_cancel(thread) == 0);
	CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
	return 0;
}
