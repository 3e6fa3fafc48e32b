/* Options, roles, checks, the case loop and data.  Pairs are in pair.c, the out-of-band channel in oob.c. */
#include "common.h"
#include "internal.h"

#include <getopt.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <time.h>

bool is_a, is_b;
struct ibv_device **devices;
struct ibv_context *ctx;
struct ibv_device_attr dev_attr;
struct ibv_port_attr port_attr;
union ibv_gid own_gid;
int gid_index;
uint8_t port_num = 1;
uint64_t seed;
bool is_rxe;
double patience = 1;

static const char *current = "(set-up)";
static jmp_buf case_end;
static enum verdict verdict;
static char reason[1024];
static _Thread_local bool main_thread;

/* ---- checks ------------------------------------------------------------------------------------------------------ */

static const char *err_name(int err)
{
	const char *name = strerrorname_np(err);
	return name ? name : "?";
}

_Noreturn void end_case(enum verdict how, const char *why)
{
	if (!main_thread) { /* cannot unwind into another thread's frame */
		printf("FAIL %s: %s\n", current, why);
		exit(1);
	}
	if (verdict != FAILED) { /* what comes after the first failure, clean-up included, follows from it */
		verdict = how;
		snprintf(reason, sizeof(reason), "%s", why);
	}
	longjmp(case_end, 1);
}

_Noreturn void fail_at(const char *file, int line, const char *fmt, ...)
{
	char text[900], why[1000];
	va_list ap;
	const char *base = strrchr(file, '/');

	va_start(ap, fmt);
	vsnprintf(text, sizeof(text), fmt, ap);
	va_end(ap);
	snprintf(why, sizeof(why), "%s:%d: %s", base ? base + 1 : file, line, text);
	end_case(FAILED, why);
}

_Noreturn void skip_case(const char *fmt, ...)
{
	char why[900];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(why, sizeof(why), fmt, ap);
	va_end(ap);
	end_case(SKIPPED, why);
}

void eq_at(const char *file, int line, const char *what, long long got, long long want)
{
	if (got != want)
		fail_at(file, line, "%s: expected %lld (0x%llx), got %lld (0x%llx)", what, want, want, got, got);
}

void rc_at(const char *file, int line, const char *what, int got, int want)
{
	if (got != want)
		fail_at(file, line, "%s: expected %d %s, got %d %s", what, want, want ? err_name(want) : "success", got,
			got ? err_name(got) : "success");
}

void *made_at(const char *file, int line, const char *what, void *object)
{
	int err = errno;

	if (!object)
		fail_at(file, line, "%s: expected an object, got NULL, errno %d %s", what, err, err_name(err));
	return object;
}

void not_made_at(const char *file, int line, const char *what, const void *object, int got, int want)
{
	if (object)
		fail_at(file, line, "%s: expected NULL and %s, got an object", what, err_name(want));
	if (got != want)
		fail_at(file, line, "%s: expected errno %s, got %d %s", what, err_name(want), got, err_name(got));
}

/* ---- data -------------------------------------------------------------------------------------------------------- */

uint64_t next_random(uint64_t *state) /* splitmix64 */
{
	uint64_t z = (*state += 0x9e3779b97f4a7c15u);

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return z ^ (z >> 31);
}

void fill(void *buf, size_t len, uint64_t stream)
{
	uint64_t state = seed ^ (stream * 0xd1342543de82ef95u), word = 0;
	uint8_t *p = buf;

	for (size_t i = 0; i < len; i += 8) {
		word = next_random(&state);
		memcpy(p + i, &word, len - i < 8 ? len - i : 8);
	}
}

static size_t first_difference(const uint8_t *p, size_t len, uint64_t stream)
{
	uint64_t state = seed ^ (stream * 0xd1342543de82ef95u);

	for (size_t i = 0; i < len; i += 8) {
		uint64_t word = next_random(&state);
		size_t n = len - i < 8 ? len - i : 8;

		for (size_t k = 0; k < n; k++)
			if (p[i + k] != ((uint8_t *)&word)[k])
				return i + k;
	}
	return len;
}

bool same(const void *buf, size_t len, uint64_t stream)
{
	return first_difference(buf, len, stream) == len;
}

void same_at(const char *file, int line, const void *buf, size_t len, uint64_t stream)
{
	size_t at = first_difference(buf, len, stream);

	if (at != len)
		fail_at(file, line, "wrong byte 0x%02x at %zu of %zu", ((const uint8_t *)buf)[at], at, len);
}

void all_at(const char *file, int line, const void *buf, size_t len, uint8_t byte)
{
	const uint8_t *p = buf;

	for (size_t i = 0; i < len; i++)
		if (p[i] != byte)
			fail_at(file, line, "expected byte 0x%02x untouched at %zu of %zu, got 0x%02x", byte, i, len, p[i]);
}

double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- options and the device -------------------------------------------------------------------------------------- */

struct options {
	const char *dev, *only, *client;
	int server_port;
	unsigned watchdog;
	bool list;
};

static void usage(const char *name)
{
	fprintf(stderr,
		"usage: %s (--self | --server PORT | --client ADDR:PORT) [--dev NAME] [--gid-index N] [--ib-port N]\n"
		"       [--seed N] [--only SUBSTRING] [--watchdog SECONDS] [--patience FACTOR] | --list\n",
		name);
	exit(2);
}

static struct options parse(int argc, char **argv)
{
	static const struct option table[] = {
		{ "self", no_argument, 0, 's' },	    { "server", required_argument, 0, 'l' },
		{ "client", required_argument, 0, 'c' },    { "dev", required_argument, 0, 'd' },
		{ "gid-index", required_argument, 0, 'g' }, { "ib-port", required_argument, 0, 'i' },
		{ "seed", required_argument, 0, 'S' },	    { "only", required_argument, 0, 'o' },
		{ "watchdog", required_argument, 0, 'w' },  { "patience", required_argument, 0, 'p' },
		{ "list", no_argument, 0, 'L' },	    { 0, 0, 0, 0 },
	};
	struct options o = { .watchdog = 60 };

	for (int c; (c = getopt_long(argc, argv, "", table, NULL)) != -1;) {
		switch (c) {
		case 's': is_a = is_b = true; break;
		case 'l': is_b = true; o.server_port = atoi(optarg); break;
		case 'c': is_a = true; o.client = optarg; break;
		case 'd': o.dev = optarg; break;
		case 'g': gid_index = atoi(optarg); break;
		case 'i': port_num = (uint8_t)atoi(optarg); break;
		case 'S': seed = strtoull(optarg, NULL, 0); break;
		case 'o': o.only = optarg; break;
		case 'w': o.watchdog = (unsigned)atoi(optarg); break;
		case 'p': patience = atof(optarg); break;
		case 'L': o.list = true; break;
		default: usage(argv[0]);
		}
	}
	if (optind != argc || (!o.list && !is_a && !is_b))
		usage(argv[0]);
	return o;
}

static void die(const char *what)
{
	printf("FAIL %s: %s: %s\n", current, what, strerror(errno));
	exit(1);
}

static void open_device(const char *want)
{
	int count = 0;

	devices = ibv_get_device_list(&count);
	if (!devices)
		die("ibv_get_device_list");
	struct ibv_device *dev = devices[0];
	for (int i = 0; want && i < count; i++)
		if (!strcmp(ibv_get_device_name(devices[i]), want))
			dev = devices[i];
	if (!dev || (want && strcmp(ibv_get_device_name(dev), want))) {
		printf("FAIL %s: %d devices, none is %s\n", current, count, want ? want : "there");
		exit(1);
	}
	is_rxe = !strncmp(ibv_get_device_name(dev), "rxe", 3);
	ctx = ibv_open_device(dev);
	if (!ctx)
		die("ibv_open_device");
	if ((errno = ibv_query_device(ctx, &dev_attr)))
		die("ibv_query_device");
	if ((errno = ibv_query_port(ctx, port_num, &port_attr)))
		die("ibv_query_port");
	if (ibv_query_gid(ctx, port_num, gid_index, &own_gid))
		die("ibv_query_gid");
}

#ifdef __SANITIZE_ADDRESS__
/* Objects that live until exit are not what is looked for, and the leak checker needs ptrace, which containers lack. */
const char *__asan_default_options(void);
const char *__asan_default_options(void)
{
	return "detect_leaks=0:abort_on_error=0";
}
#endif

/* ---- the case loop ----------------------------------------------------------------------------------------------- */

static void on_alarm(int sig)
{
	static const char text[] = ": watchdog: the case did not end\n";
	ssize_t n;

	(void)sig;
	n = write(1, "FAIL ", 5);
	n = write(1, current, strlen(current));
	n = write(1, text, sizeof(text) - 1);
	(void)n;
	_exit(3);
}

/* The verdict of both processes together: a failure anywhere fails, a skip anywhere skips. */
static void agree(bool local)
{
	enum verdict theirs = oob_end_case(verdict);

	if (local || verdict == FAILED || theirs == PASSED)
		return;
	if (verdict == PASSED || theirs == FAILED)
		snprintf(reason, sizeof(reason), theirs == FAILED ? "failed in the other process" : "EOPNOTSUPP in the other process");
	verdict = theirs;
}

static enum verdict run_case(const struct test_case *c, unsigned watchdog)
{
	current = c->name;
	verdict = PASSED;
	reason[0] = 0;
	alarm((unsigned)(watchdog * patience));
	if (!setjmp(case_end))
		c->run();
	agree(c->flags & LOCAL);
	/* Clean-up is part of the case: an object that cannot be destroyed is a failure of its own. */
	if (!setjmp(case_end))
		ends_destroy_all();
	alarm(0);
	if (verdict == PASSED)
		printf("ok %s\n", c->name);
	else
		printf("%s %s: %s\n", verdict == FAILED ? "FAIL" : "skip", c->name, reason);
	return verdict;
}

int suite_main(int argc, char **argv, const struct test_case *cases, size_t count)
{
	struct options o = parse(argc, argv);
	unsigned ran = 0, tally[3] = { 0 };

	main_thread = true;
	setvbuf(stdout, NULL, _IOLBF, 0);
	if (o.list) {
		for (size_t i = 0; i < count; i++)
			puts(cases[i].name);
		return 0;
	}
	signal(SIGALRM, on_alarm);
	signal(SIGPIPE, SIG_IGN);
	alarm((unsigned)(o.watchdog * patience));
	if (!seed)
		seed = ((uint64_t)getpid() << 32) ^ (uint64_t)(now() * 1e9);
	oob_open(o.client, o.server_port);
	seed = from_a(seed);
	open_device(o.dev);
	printf("# %s on %s, gid index %d, --seed 0x%" PRIx64 "\n", argv[0], ibv_get_device_name(ctx->device), gid_index, seed);
	for (size_t i = 0; i < count; i++) {
		if (o.only && !strstr(cases[i].name, o.only))
			continue;
		ran++;
		tally[run_case(&cases[i], o.watchdog)]++;
	}
	current = "close_device";
	if (ibv_close_device(ctx))
		die("ibv_close_device");
	ibv_free_device_list(devices);
	printf("# %u ok, %u failed, %u skipped\n", tally[PASSED], tally[FAILED], tally[SKIPPED]);
	oob_goodbye();
	return tally[FAILED] || !ran;
}
