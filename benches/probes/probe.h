/* What the probes share: time, pinning, medians, and giving up loudly. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <signal.h>

#define MUST(call) ((call) ? (void)0 : (perror(#call), exit(1)))

static inline double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec * 1e-9;
}

static inline void pin(int cpu)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(cpu, &set);
	MUST(sched_setaffinity(0, sizeof set, &set) == 0);
}

static inline int ascending(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;
	return (x > y) - (x < y);
}

static inline double median(double *all, int count)
{
	qsort(all, count, sizeof *all, ascending);
	return all[count / 2];
}

/* A child that ends with its parent. 0 in the child. */
static inline pid_t fork_pinned(int parent_cpu, int child_cpu)
{
	pid_t child = fork();
	MUST(child >= 0);
	if (child == 0)
		MUST(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
	pin(child ? parent_cpu : child_cpu);
	return child;
}
