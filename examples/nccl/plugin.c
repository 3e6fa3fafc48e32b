/* The interface that NCCL uses, without NCCL: loads the network plugin and sends a message from this process to itself.
 *
 *     make && freeflow run -- ./plugin
 *
 * The declarations below are version 8 of the interface (NCCL 2.20 to 2.23); later ones differ in a few arguments.
 */
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int result_t; /* ncclResult_t: 0 is success */
typedef void (*logger_t)(int level, unsigned long subsystems, const char *file, int line, const char *format, ...);

struct properties {
	char *name, *pci_path;
	uint64_t guid;
	int ptr_support, reg_is_global, speed, port;
	float latency;
	int max_comms, max_recvs, net_device_type, net_device_version;
};

struct net_v8 {
	const char *name;
	result_t (*init)(logger_t);
	result_t (*devices)(int *count);
	result_t (*get_properties)(int dev, struct properties *);
	result_t (*listen)(int dev, void *handle, void **listen_comm);
	result_t (*connect)(int dev, void *handle, void **send_comm, void **device_comm);
	result_t (*accept)(void *listen_comm, void **recv_comm, void **device_comm);
	result_t (*reg_mr)(void *comm, void *data, size_t size, int type, void **mhandle);
	result_t (*reg_mr_dma_buf)(void *comm, void *data, size_t size, int type, uint64_t offset, int fd, void **mhandle);
	result_t (*dereg_mr)(void *comm, void *mhandle);
	result_t (*isend)(void *comm, void *data, int size, int tag, void *mhandle, void **request);
	result_t (*irecv)(void *comm, int n, void **data, int *sizes, int *tags, void **mhandles, void **request);
	result_t (*iflush)(void *comm, int n, void **data, int *sizes, void **mhandles, void **request);
	result_t (*test)(void *request, int *done, int *sizes);
	result_t (*close_send)(void *comm);
	result_t (*close_recv)(void *comm);
	result_t (*close_listen)(void *comm);
	result_t (*get_device_mr)(void *comm, void *mhandle, void **device_mhandle);
	result_t (*irecv_consumed)(void *comm, int n, void *request);
};

#define HOST_MEMORY 1 /* NCCL_PTR_HOST */
#define HANDLE_SIZE 128

static void logger(int level, unsigned long subsystems, const char *file, int line, const char *format, ...)
{
	va_list arguments;

	(void)level, (void)subsystems, (void)file, (void)line;
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
}

static void must(const char *what, result_t result)
{
	if (result == 0)
		return;
	fprintf(stderr, "%s failed: %d\n", what, result);
	exit(1);
}

/* Nothing in the interface waits: whoever wants to, asks again. */
static int wait_for(const struct net_v8 *net, void *request)
{
	int done = 0, size = -1;

	while (!done)
		must("test", net->test(request, &done, &size));
	return size;
}

int main(void)
{
	const char *named = getenv("NCCL_NET_PLUGIN");
	char file[256];

	snprintf(file, sizeof file, "libnccl-net-%s.so", named ? named : "freeflow");
	void *library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
	const struct net_v8 *net = library ? dlsym(library, "ncclNetPlugin_v8") : NULL;
	if (!net) {
		fprintf(stderr, "%s\n", dlerror());
		return 1;
	}
	int devices = 0;
	struct properties properties;
	must("init", net->init(logger));
	must("devices", net->devices(&devices));
	must("getProperties", net->get_properties(0, &properties));
	printf("plugin %s, %d device: %s\n", net->name, devices, properties.name);

	/* NCCL carries the handle to the other rank; here it is at hand. */
	char handle[HANDLE_SIZE];
	void *listener, *to = NULL, *from = NULL, *unused;
	must("listen", net->listen(0, handle, &listener));
	while (!to || !from) {
		if (!to)
			must("connect", net->connect(0, handle, &to, &unused));
		if (!from)
			must("accept", net->accept(listener, &from, &unused));
	}
	must("closeListen", net->close_listen(listener));

	char *out = aligned_alloc(4096, 4096), *in = aligned_alloc(4096, 4096);
	void *out_handle, *in_handle;
	if (!out || !in)
		return 1;
	must("regMr", net->reg_mr(to, out, 4096, HOST_MEMORY, &out_handle));
	must("regMr", net->reg_mr(from, in, 4096, HOST_MEMORY, &in_handle));

	strcpy(out, "hello from one rank to the next");
	void *data[] = {in}, *handles[] = {in_handle}, *receive = NULL, *send = NULL;
	int sizes[] = {4096}, tags[] = {0};
	/* Both may say "not now" with a request of NULL: a send does, until its receive is posted. */
	while (!receive)
		must("irecv", net->irecv(from, 1, data, sizes, tags, handles, &receive));
	while (!send)
		must("isend", net->isend(to, out, (int)strlen(out) + 1, 0, out_handle, &send));
	wait_for(net, send);
	printf("received %d bytes: %s\n", wait_for(net, receive), in);

	must("deregMr", net->dereg_mr(to, out_handle));
	must("deregMr", net->dereg_mr(from, in_handle));
	must("closeSend", net->close_send(to));
	must("closeRecv", net->close_recv(from));
	free(out);
	free(in);
	return 0;
}
