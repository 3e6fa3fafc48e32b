/* Two processes over UCX's protocol layer: tagged messages, put, get, atomics and active messages, each checked.
 *
 *   pair            waits for its partner on port 13337
 *   pair ADDRESS    connects to it
 *   pair --wait ... after the tagged messages, waits for the partner's death
 *
 * UCX_TLS=ff,self has all of it go over FreeFlow; the TCP connection only carries the two worker addresses. */
#include <netdb.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <ucp/api/ucp.h>
#include <unistd.h>

#define PORT "13337"
#define AM_ID 7
#define LARGEST (4u << 20)

static ucp_context_h context;
static ucp_worker_h worker;
static ucp_ep_h peer;
static size_t am_received;
static ucs_status_t peer_error = UCS_OK;

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "pair: %s: %s\n", what, why);
    exit(1);
}

static void check(ucs_status_t status, const char *what)
{
    if (status != UCS_OK)
        fail(what, ucs_status_string(status));
}

static void on_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)arg, (void)ep;
    peer_error = status;
}

/* Makes progress until the request is done. */
static void wait_for(ucs_status_ptr_t request, const char *what)
{
    ucs_status_t status = UCS_OK;

    if (UCS_PTR_IS_ERR(request))
        fail(what, ucs_status_string(UCS_PTR_STATUS(request)));
    if (request == NULL)
        return;
    do {
        ucp_worker_progress(worker);
        status = ucp_request_check_status(request);
    } while (status == UCS_INPROGRESS);
    ucp_request_free(request);
    check(status, what);
}

/* ---- finding each other ------------------------------------------------------------------------------------- */

static int meet(const char *host)
{
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *found;
    int one = 1, fd, partner;

    if (getaddrinfo(host, PORT, &hints, &found) != 0)
        fail("getaddrinfo", host ? host : "any");
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (host) {
        if (connect(fd, found->ai_addr, found->ai_addrlen) != 0)
            fail("connect", host);
        return fd;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
    if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, 1) != 0)
        fail("listen", PORT);
    partner = accept(fd, NULL, NULL);
    close(fd);
    return partner;
}

static void whole(ssize_t done, size_t len)
{
    if (done != (ssize_t)len)
        fail("exchange", "the partner hung up");
}

/* Sends ours, returns theirs. */
static void *exchange(int fd, const void *ours, size_t len, size_t *their_len)
{
    void *theirs;

    whole(send(fd, &len, sizeof(len), 0), sizeof(len));
    whole(send(fd, ours, len, 0), len);
    whole(recv(fd, their_len, sizeof(*their_len), MSG_WAITALL), sizeof(*their_len));
    theirs = malloc(*their_len);
    whole(recv(fd, theirs, *their_len, MSG_WAITALL), *their_len);
    return theirs;
}

static void together(int fd)
{
    size_t len;

    free(exchange(fd, "", 1, &len));
}

/* While the partner may still need our progress. */
static void together_with_progress(int fd)
{
    char byte = 0;

    whole(send(fd, &byte, 1, 0), 1);
    while (recv(fd, &byte, 1, MSG_DONTWAIT) != 1)
        ucp_worker_progress(worker);
}

/* ---- what is tried ------------------------------------------------------------------------------------------ */

static void fill(uint8_t *bytes, size_t len, unsigned seed)
{
    for (size_t i = 0; i < len; i++)
        bytes[i] = (uint8_t)(seed + i * 7 + (i >> 8));
}

static void compare(const uint8_t *bytes, size_t len, unsigned seed, const char *what)
{
    for (size_t i = 0; i < len; i++)
        if (bytes[i] != (uint8_t)(seed + i * 7 + (i >> 8)))
            fail(what, "the data is not what was sent");
}

static void tagged(int first, uint8_t *out, uint8_t *in)
{
    ucp_request_param_t none = {0};

    for (size_t len = 1; len <= LARGEST; len *= 4) {
        for (int turn = 0; turn < 2; turn++) {
            unsigned seed = (unsigned)len + turn;
            if (turn == first) {
                fill(out, len, seed);
                wait_for(ucp_tag_send_nbx(peer, out, len, len, &none), "tagged send");
            } else {
                memset(in, 0, len);
                wait_for(ucp_tag_recv_nbx(worker, in, len, len, (ucp_tag_t)-1, &none), "tagged receive");
                compare(in, len, seed, "tagged receive");
            }
        }
    }
}

struct window {
    uint64_t address;
    char rkey[];
};

/* Each writes into the other's memory, reads it back, and adds to a counter. */
static void remote_memory(int fd, int first)
{
    ucp_mem_map_params_t params = {
        .field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH,
        .length = LARGEST + sizeof(uint64_t),
    };
    ucp_request_param_t none = {0};
    uint64_t old = 0, one = 1;
    ucp_request_param_t fetch = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_REPLY_BUFFER | UCP_OP_ATTR_FIELD_DATATYPE,
        .datatype = ucp_dt_make_contig(8),
        .reply_buffer = &old,
    };
    uint8_t *mine = NULL, *scratch = malloc(LARGEST);
    struct window *ours, *theirs;
    size_t key_len, len;
    ucp_mem_h memory;
    ucp_rkey_h rkey;
    void *key;

    if (posix_memalign((void **)&mine, 4096, params.length) != 0)
        fail("posix_memalign", "no memory");
    memset(mine, 0, params.length);
    params.address = mine;
    check(ucp_mem_map(context, &params, &memory), "ucp_mem_map");
    check(ucp_rkey_pack(context, memory, &key, &key_len), "ucp_rkey_pack");
    ours = malloc(sizeof(*ours) + key_len);
    ours->address = (uint64_t)mine;
    memcpy(ours->rkey, key, key_len);
    theirs = exchange(fd, ours, sizeof(*ours) + key_len, &len);
    check(ucp_ep_rkey_unpack(peer, theirs->rkey, &rkey), "ucp_ep_rkey_unpack");

    for (size_t size = 1; size <= LARGEST; size *= 4) {
        fill(scratch, size, (unsigned)size + first);
        wait_for(ucp_put_nbx(peer, scratch, size, theirs->address, rkey, &none), "put");
        wait_for(ucp_ep_flush_nbx(peer, &none), "flush");
        together_with_progress(fd);
        compare(mine, size, (unsigned)size + !first, "put");
        memset(scratch, 0, size);
        wait_for(ucp_get_nbx(peer, scratch, size, theirs->address, rkey, &none), "get");
        compare(scratch, size, (unsigned)size + first, "get");
        together_with_progress(fd);
    }
    for (uint64_t i = 0; i < 100; i++) {
        wait_for(ucp_atomic_op_nbx(peer, UCP_ATOMIC_OP_ADD, &one, 1, theirs->address + LARGEST, rkey, &fetch),
                 "fetch and add");
        if (old != i)
            fail("fetch and add", "a wrong old value");
    }
    together_with_progress(fd);
    if (*(uint64_t *)(mine + LARGEST) != 100)
        fail("fetch and add", "a wrong sum");
    ucp_rkey_destroy(rkey);
    check(ucp_mem_unmap(context, memory), "ucp_mem_unmap");
    ucp_rkey_buffer_release(key);
    free(ours), free(theirs), free(scratch), free(mine);
}

static ucs_status_t on_message(void *arg, const void *header, size_t header_len, void *data, size_t len,
                               const ucp_am_recv_param_t *param)
{
    (void)arg;
    if (header_len != 4 || memcmp(header, "head", 4) != 0)
        fail("active message", "a wrong header");
    if (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV)
        fail("active message", "a rendezvous where none was asked for");
    compare(data, len, 3, "active message");
    am_received += len;
    return UCS_OK;
}

static void active_messages(int fd, uint8_t *out)
{
    ucp_request_param_t eager = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_AM_SEND_FLAG_EAGER};
    const size_t len = 20000, count = 200;

    fill(out, len, 3);
    for (size_t i = 0; i < count; i++)
        wait_for(ucp_am_send_nbx(peer, AM_ID, "head", 4, out, len, &eager), "active message");
    while (am_received < count * len)
        ucp_worker_progress(worker);
    together_with_progress(fd);
}

/* Waits until the partner is gone, and says how that was told: for trying what happens when one is killed. */
static void wait_for_the_end(void)
{
    ucp_request_param_t none = {0};
    static uint8_t byte;
    ucs_status_ptr_t receive = ucp_tag_recv_nbx(worker, &byte, 1, 1, (ucp_tag_t)-1, &none);

    puts("waiting");
    fflush(stdout);
    while (peer_error == UCS_OK)
        ucp_worker_progress(worker);
    printf("the partner is gone: %s\n", ucs_status_string(peer_error));
    ucp_request_cancel(worker, receive);
}

int main(int argc, char **argv)
{
    int wait = argc > 1 && strcmp(argv[1], "--wait") == 0;
    const char *host = argc > 1 + wait ? argv[1 + wait] : NULL;
    ucp_params_t params = {
        .field_mask = UCP_PARAM_FIELD_FEATURES,
        .features = UCP_FEATURE_TAG | UCP_FEATURE_RMA | UCP_FEATURE_AMO64 | UCP_FEATURE_AM,
    };
    ucp_worker_params_t worker_params = {
        .field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE,
        .thread_mode = UCS_THREAD_MODE_SINGLE,
    };
    ucp_am_handler_param_t handler = {
        .field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB,
        .id = AM_ID,
        .cb = on_message,
    };
    uint8_t *out = malloc(LARGEST), *in = malloc(LARGEST);
    ucp_address_t *address;
    size_t len, their_len;
    ucp_config_t *config;

    check(ucp_config_read(NULL, NULL, &config), "ucp_config_read");
    check(ucp_init(&params, config, &context), "ucp_init");
    ucp_config_release(config);
    check(ucp_worker_create(context, &worker_params, &worker), "ucp_worker_create");
    check(ucp_worker_set_am_recv_handler(worker, &handler), "ucp_worker_set_am_recv_handler");
    check(ucp_worker_get_address(worker, &address, &len), "ucp_worker_get_address");

    int fd = meet(host);
    ucp_ep_params_t ep_params = {
        .field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                      UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .address = exchange(fd, address, len, &their_len),
        .err_mode = wait ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE,
        .err_handler = {.cb = on_error},
    };
    check(ucp_ep_create(worker, &ep_params, &peer), "ucp_ep_create");
    free((void *)ep_params.address);

    tagged(host != NULL, out, in);
    if (wait) {
        wait_for_the_end();
    } else {
        remote_memory(fd, host != NULL);
        active_messages(fd, out);
    }
    ucp_request_param_t how = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS,
        .flags = wait ? UCP_EP_CLOSE_FLAG_FORCE : 0,
    };
    wait_for(ucp_ep_close_nbx(peer, &how), "ucp_ep_close");
    if (!wait)
        together(fd);
    ucp_worker_release_address(worker, address);
    ucp_worker_destroy(worker);
    ucp_cleanup(context);
    free(out), free(in);
    printf("pair: all of it arrived\n");
    return 0;
}
