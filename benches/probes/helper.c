/* helper server|client ADDRESS ROUNDS WAIT: the least that one way costs between two programs which look at memory, with a process each
 * between them and the wire, as two hosts' routers are. A program writes a word and, if its helper sleeps, a byte into a pipe;
 * the helper sends 72 bytes by TCP; the other helper writes a word there, and waits WAIT microseconds for an answer before it sleeps.
 * A helper that is woken by packets of another processor eight times in a row goes there, as the routers do.
 * Nothing else is done: no keys, no queues, no acknowledgements. Prints the microseconds of one way. */
#include "probe.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdatomic.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum { MESSAGE = 72, PORT = 7777, WARM = 1000 };

static struct shared {
	_Alignas(64) _Atomic unsigned came;
	_Alignas(64) _Atomic unsigned goes;
	_Alignas(64) _Atomic unsigned sleeps;
} *words;

static int meet(int server, const char *address)
{
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(PORT) };
	int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1, wire = fd;

	MUST(fd >= 0 && inet_pton(AF_INET, address, &a.sin_addr) == 1);
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (server) {
		MUST(bind(fd, (struct sockaddr *)&a, sizeof a) == 0 && listen(fd, 1) == 0);
		MUST((wire = accept(fd, NULL, NULL)) >= 0);
	} else {
		MUST(connect(fd, (struct sockaddr *)&a, sizeof a) == 0);
	}
	MUST(setsockopt(wire, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0);
	MUST(fcntl(wire, F_SETFL, O_NONBLOCK) == 0);
	return wire;
}

/* As the routers ask for it: short slices, which preempt programs that look. */
static void be_prompt(void)
{
	struct { unsigned size, policy; unsigned long flags; int nice; unsigned priority; unsigned long runtime, deadline, period; }
		attr = { .size = sizeof attr, .nice = -15, .runtime = 100000 };

	MUST(syscall(SYS_sched_setattr, 0, &attr, 0) == 0);
}

static void follow(int wire)
{
	static int elsewhere;
	int cpu = -1;
	socklen_t len = sizeof cpu;
	cpu_set_t one, allowed;

	MUST(getsockopt(wire, SOL_SOCKET, SO_INCOMING_CPU, &cpu, &len) == 0);
	elsewhere = cpu == sched_getcpu() ? 0 : elsewhere + 1;
	if (elsewhere < 8)
		return;
	elsewhere = 0;
	CPU_ZERO(&one);
	CPU_SET(cpu, &one);
	MUST(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
	if (CPU_ISSET(cpu, &allowed))
		MUST(sched_setaffinity(0, sizeof one, &one) == 0 && sched_setaffinity(0, sizeof allowed, &allowed) == 0);
}

static void watch(int epoll, int fd)
{
	struct epoll_event event = { .events = EPOLLIN | EPOLLET, .data.fd = fd };

	MUST(epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0);
}

static void help(int wire, int bell, double wait)
{
	char bytes[4 * MESSAGE] = { 0 }, rings[4096];
	int epoll = epoll_create1(0);
	unsigned sent = 0;

	be_prompt();
	watch(epoll, wire);
	watch(epoll, bell);
	for (;;) {
		struct epoll_event events[2];
		int came = 0, count = 0;

		atomic_store(&words->sleeps, 1);
		if (atomic_load(&words->goes) == sent)
			count = epoll_wait(epoll, events, 2, 20);
		atomic_store(&words->sleeps, 0);
		for (int i = 0; i < count; i++) {
			ssize_t got = read(events[i].data.fd, events[i].data.fd == wire ? bytes : rings, sizeof bytes);

			if (events[i].data.fd != wire)
				continue;
			if (got == 0)
				_exit(0);
			came += got / MESSAGE;
			follow(wire);
		}
		atomic_fetch_add(&words->came, came);
		for (double end = now() + wait; came && atomic_load(&words->goes) == sent && now() < end;)
			;
		if (atomic_load(&words->goes) != sent) {
			sent = atomic_load(&words->goes);
			MUST(send(wire, bytes, MESSAGE, MSG_NOSIGNAL) == MESSAGE);
		}
	}
}

static void post(int bell, unsigned number)
{
	atomic_store(&words->goes, number);
	if (atomic_exchange(&words->sleeps, 0))
		MUST(write(bell, "", 1) == 1 || errno == EAGAIN);
}

int main(int argc, char **argv)
{
	int bells[2];

	MUST(argc == 5);
	int server = argv[1][0] == 's', rounds = atoi(argv[3]), wire = meet(server, argv[2]);
	words = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	MUST(words != MAP_FAILED && pipe2(bells, O_NONBLOCK) == 0);
	pid_t helper = fork();
	MUST(helper >= 0);
	if (helper == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		help(wire, bells[0], atof(argv[4]) * 1e-6);
	}
	double begin = 0;
	for (int i = 1; i <= rounds + WARM; i++) {
		if (i == WARM + 1)
			begin = now();
		if (!server)
			post(bells[1], i);
		while (atomic_load(&words->came) < (unsigned)i)
			;
		if (server)
			post(bells[1], i);
	}
	printf("%.2f\n", (now() - begin) / rounds / 2 * 1e6);
	if (server)
		usleep(100000); /* its helper sends the last answer */
	kill(helper, SIGKILL);
	waitpid(helper, NULL, 0);
	return 0;
}
