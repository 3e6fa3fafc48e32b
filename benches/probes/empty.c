/* A verbs provider that does nothing but complete: perftest's own loop is all that remains. Preloaded into perftest, in
 * front of the real library; never part of what users get. */
#include <infiniband/verbs.h>
#include <stdlib.h>

static struct ibv_device device = { .node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB, .name = "empty" };
static struct ibv_context context;
static struct ibv_cq cq;
static struct ibv_qp qp;
static uint64_t last;
static int pending;

static int post_send(struct ibv_qp *to, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	(void)to, (void)bad;
	for (; wr; wr = wr->next) {
		if (!(wr->send_flags & IBV_SEND_SIGNALED))
			continue;
		last = wr->wr_id;
		pending++;
	}
	return 0;
}

static int poll_cq(struct ibv_cq *from, int room, struct ibv_wc *wc)
{
	int count = pending < room ? pending : room;
	(void)from;
	for (int i = 0; i < count; i++) {
		wc[i].wr_id = last;
		wc[i].status = IBV_WC_SUCCESS;
	}
	pending -= count;
	return count;
}

struct ibv_device **ibv_get_device_list(int *count)
{
	struct ibv_device **list = calloc(2, sizeof *list);
	list[0] = &device;
	if (count)
		*count = 1;
	return list;
}

const char *ibv_get_device_name(struct ibv_device *of) { return of->name; }

struct ibv_context *ibv_open_device(struct ibv_device *of)
{
	context.device = of;
	context.ops.post_send = post_send;
	context.ops.poll_cq = poll_cq;
	return &context;
}

int ibv_close_device(struct ibv_context *of) { (void)of; return 0; }

int ibv_query_device(struct ibv_context *of, struct ibv_device_attr *attr)
{
	(void)of;
	*attr = (struct ibv_device_attr){ .max_qp = 1, .max_qp_wr = 1 << 15, .max_cqe = 1 << 20, .max_qp_rd_atom = 16,
		.max_qp_init_rd_atom = 16, .phys_port_cnt = 1, .max_sge = 1 };
	return 0;
}

#undef ibv_query_port
int ibv_query_port(struct ibv_context *of, uint8_t port, struct _compat_ibv_port_attr *compat)
{
	struct ibv_port_attr *attr = (void *)compat;
	(void)of, (void)port;
	attr->state = IBV_PORT_ACTIVE;
	attr->max_mtu = attr->active_mtu = IBV_MTU_4096;
	attr->gid_tbl_len = 1;
	attr->link_layer = IBV_LINK_LAYER_ETHERNET;
	return 0;
}

int ibv_query_gid(struct ibv_context *of, uint8_t port, int index, union ibv_gid *gid)
{
	(void)of, (void)port, (void)index;
	*gid = (union ibv_gid){ .raw = { [10] = 255, 255, 127, 0, 0, 1 } };
	return 0;
}

struct ibv_pd *ibv_alloc_pd(struct ibv_context *of)
{
	struct ibv_pd *pd = calloc(1, sizeof *pd);
	pd->context = of;
	return pd;
}

int ibv_dealloc_pd(struct ibv_pd *pd) { free(pd); return 0; }

struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access)
{
	struct ibv_mr *mr = calloc(1, sizeof *mr);
	(void)iova, (void)access;
	*mr = (struct ibv_mr){ .context = pd->context, .pd = pd, .addr = addr, .length = length, .lkey = 1, .rkey = 1 };
	return mr;
}

#undef ibv_reg_mr
struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	return ibv_reg_mr_iova2(pd, addr, length, 0, access);
}

int ibv_dereg_mr(struct ibv_mr *mr) { free(mr); return 0; }

struct ibv_cq *ibv_create_cq(struct ibv_context *of, int cqe, void *user, struct ibv_comp_channel *channel, int vector)
{
	(void)vector;
	cq = (struct ibv_cq){ .context = of, .channel = channel, .cq_context = user, .cqe = cqe };
	return &cq;
}

int ibv_destroy_cq(struct ibv_cq *of) { (void)of; return 0; }

struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *init)
{
	qp = (struct ibv_qp){ .context = pd->context, .pd = pd, .send_cq = init->send_cq, .recv_cq = init->recv_cq,
		.qp_num = 1, .qp_type = init->qp_type };
	return &qp;
}

int ibv_modify_qp(struct ibv_qp *of, struct ibv_qp_attr *attr, int mask) { (void)of, (void)attr, (void)mask; return 0; }

int ibv_query_qp(struct ibv_qp *of, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init)
{
	(void)of, (void)mask;
	*attr = (struct ibv_qp_attr){ 0 };
	*init = (struct ibv_qp_init_attr){ 0 };
	return 0;
}

int ibv_destroy_qp(struct ibv_qp *of) { (void)of; return 0; }
