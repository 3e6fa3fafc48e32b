/* Both ends of connections in one process: order and content of events, QPs, data, ends. */
#include "cm.h"

static struct rdma_event_channel *client, *server;

/* Moves a message over an established connection and checks it. */
static void send_one(struct rdma_cm_id *from, struct rdma_cm_id *to, char mark)
{
	static char out[4096], in[4096];
	struct ibv_wc wc;

	memset(out, mark, sizeof(out));
	struct ibv_mr *out_mr = rdma_reg_msgs(from, out, sizeof(out)), *in_mr = rdma_reg_msgs(to, in, sizeof(in));
	CHECK(out_mr && in_mr);
	CHECK(rdma_post_recv(to, in, in, sizeof(in), in_mr) == 0);
	CHECK(rdma_post_send(from, out, out, sizeof(out), out_mr, 0) == 0);
	CHECK(rdma_get_recv_comp(to, &wc) == 1 && wc.status == IBV_WC_SUCCESS && wc.byte_len == sizeof(in));
	CHECK(rdma_get_send_comp(from, &wc) == 1 && wc.status == IBV_WC_SUCCESS);
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK(rdma_dereg_mr(out_mr) == 0);
	CHECK(rdma_dereg_mr(in_mr) == 0);
}

static void a_connection(void)
{
	int port;
	struct rdma_cm_id *listen = listener(server, RDMA_PS_TCP, &port);
	struct rdma_cm_id *active = routed(client, RDMA_PS_TCP, port);
	struct ibv_qp_attr a, b;
	char long_data[57] = { 0 };

	create_qp(active);
	CHECK(qp_state(active, &a) == IBV_QPS_INIT);
	struct rdma_conn_param param = { .private_data = long_data, .private_data_len = 57, .initiator_depth = 2,
					 .responder_resources = 3, .retry_count = 5, .rnr_retry_count = 6 };
	CHECK_FAILS(rdma_connect(active, &param), EINVAL);
	param.initiator_depth = 254;
	param.private_data = "knock";
	param.private_data_len = 5;
	CHECK_FAILS(rdma_connect(active, &param), EINVAL);
	param.initiator_depth = 2;
	CHECK(rdma_connect(active, &param) == 0);

	struct rdma_cm_event *event = expect(server, RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *passive = event->id;
	CHECK(event->listen_id == listen && passive != listen && passive->context == (void *)0x1234);
	CHECK(passive->verbs && passive->channel == server && passive->route.num_paths == 1);
	CHECK(event->param.conn.private_data_len == 56);
	CHECK(!memcmp(event->param.conn.private_data, "knock\0\0", 7));
	CHECK(event->param.conn.responder_resources == 2 && event->param.conn.initiator_depth == 3);
	CHECK(event->param.conn.retry_count == 5 && event->param.conn.rnr_retry_count == 6);
	CHECK(event->param.conn.qp_num == active->qp->qp_num);
	CHECK(rdma_get_src_port(passive) == htons(port) && rdma_get_dst_port(passive) == rdma_get_src_port(active));
	CHECK(rdma_ack_cm_event(event) == 0);
	create_qp(passive);
	struct rdma_conn_param answer = { .private_data = "come in", .private_data_len = 8, .initiator_depth = 1,
					  .responder_resources = 2, .rnr_retry_count = 4 };
	CHECK(rdma_accept(passive, &answer) == 0);
	CHECK(qp_state(passive, &b) == IBV_QPS_RTS);
	CHECK(!is_readable(server->fd));

	event = expect(client, RDMA_CM_EVENT_ESTABLISHED);
	CHECK(event->id == active && event->status == 0 && event->param.conn.private_data_len == 196);
	CHECK(!strcmp(event->param.conn.private_data, "come in"));
	CHECK(event->param.conn.qp_num == passive->qp->qp_num);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_ack_cm_event(expect(server, RDMA_CM_EVENT_ESTABLISHED)) == 0);

	CHECK(qp_state(active, &a) == IBV_QPS_RTS);
	CHECK(a.dest_qp_num == passive->qp->qp_num && b.dest_qp_num == active->qp->qp_num);
	CHECK(a.rq_psn == b.sq_psn && b.rq_psn == a.sq_psn);
	CHECK(a.retry_cnt == 5 && a.rnr_retry == 4 && b.rnr_retry == 6 && a.timeout == 14);
	CHECK(a.max_rd_atomic == 2 && b.max_dest_rd_atomic == 2 && b.max_rd_atomic == 1);
	CHECK(a.qp_access_flags & IBV_ACCESS_REMOTE_WRITE && a.qp_access_flags & IBV_ACCESS_REMOTE_READ);
	send_one(active, passive, 'x');
	send_one(passive, active, 'y');

	CHECK(rdma_disconnect(active) == 0);
	CHECK(qp_state(active, &a) == IBV_QPS_ERR);
	CHECK(!is_readable(client->fd));
	CHECK(rdma_ack_cm_event(expect(server, RDMA_CM_EVENT_DISCONNECTED)) == 0);
	CHECK(rdma_disconnect(passive) == 0);
	CHECK(rdma_ack_cm_event(expect(client, RDMA_CM_EVENT_DISCONNECTED)) == 0);
	event = expect(client, RDMA_CM_EVENT_TIMEWAIT_EXIT);
	CHECK(event->id == active);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_ack_cm_event(expect(server, RDMA_CM_EVENT_TIMEWAIT_EXIT)) == 0);
	rdma_destroy_qp(active);
	rdma_destroy_qp(passive);
	CHECK(!active->qp && !active->send_cq && !active->recv_cq_channel);
	CHECK(rdma_destroy_id(active) == 0);
	CHECK(rdma_destroy_id(passive) == 0);
	CHECK(rdma_destroy_id(listen) == 0);
}

static void a_rejection(void)
{
	int port;
	struct rdma_cm_id *listen = listener(server, RDMA_PS_TCP, &port);
	struct rdma_cm_id *active = routed(client, RDMA_PS_TCP, port);
	struct ibv_qp_attr attr;

	create_qp(active);
	CHECK(rdma_connect(active, NULL) == 0);
	struct rdma_cm_event *event = expect(server, RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *passive = event->id;
	CHECK(event->param.conn.rnr_retry_count == 7);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_reject(passive, "full", 5) == 0);
	event = expect(client, RDMA_CM_EVENT_REJECTED);
	CHECK(event->status == 28 && event->param.conn.private_data_len == 148);
	CHECK(!strcmp(event->param.conn.private_data, "full"));
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(qp_state(active, &attr) == IBV_QPS_ERR);
	CHECK_FAILS(rdma_connect(active, NULL), EINVAL);
	struct rdma_conn_param param = { .qp_num = 9 };
	CHECK_FAILS(rdma_accept(passive, &param), EINVAL);
	CHECK(rdma_destroy_id(passive) == 0);
	rdma_destroy_qp(active);
	CHECK(rdma_destroy_id(active) == 0);
	CHECK(rdma_destroy_id(listen) == 0);
}

/* The program makes the QP's transitions itself (as UCX does), and moves the id in between. */
static void a_connection_without_a_qp(void)
{
	int port, mask = 0;
	struct rdma_cm_id *listen = listener(server, RDMA_PS_TCP, &port);
	struct rdma_cm_id *active = routed(client, RDMA_PS_TCP, port);
	struct rdma_event_channel *other = rdma_create_event_channel();
	struct rdma_conn_param param = { .qp_num = 0x123456, .responder_resources = 1, .initiator_depth = 1 };
	struct ibv_ece ece = { .vendor_id = 77, .options = 5 };

	CHECK_FAILS(rdma_connect(active, NULL), EINVAL);
	CHECK(rdma_set_local_ece(active, &ece) == 0);
	CHECK(rdma_connect(active, &param) == 0);
	struct rdma_cm_event *event = expect(server, RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *passive = event->id;
	CHECK(event->param.conn.qp_num == 0x123456);
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(rdma_get_remote_ece(passive, &ece) == 0 && ece.vendor_id == 77 && ece.options == 5);
	param.qp_num = 0x654321;
	CHECK(rdma_accept(passive, &param) == 0);
	CHECK(rdma_migrate_id(active, other) == 0);
	CHECK(active->channel == other && !is_readable(client->fd));
	event = expect(other, RDMA_CM_EVENT_CONNECT_RESPONSE);
	CHECK(event->param.conn.qp_num == 0x654321);
	CHECK(rdma_ack_cm_event(event) == 0);
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTR };
	CHECK(rdma_init_qp_attr(active, &attr, &mask) == 0);
	CHECK(attr.dest_qp_num == 0x654321 && mask & IBV_QP_AV && mask & IBV_QP_DEST_QPN && attr.ah_attr.is_global);
	attr.qp_state = IBV_QPS_SQD;
	CHECK_FAILS(rdma_init_qp_attr(active, &attr, &mask), EINVAL);
	CHECK(!is_readable(server->fd));
	CHECK(rdma_establish(active) == 0);
	CHECK(rdma_ack_cm_event(expect(server, RDMA_CM_EVENT_ESTABLISHED)) == 0);
	CHECK_FAILS(rdma_notify(passive, IBV_EVENT_PATH_MIG), EINVAL);
	CHECK(rdma_notify(passive, IBV_EVENT_COMM_EST) == 0);
	/* Destroying one end hangs up on the other. */
	CHECK(rdma_destroy_id(active) == 0);
	CHECK(rdma_ack_cm_event(expect(server, RDMA_CM_EVENT_DISCONNECTED)) == 0);
	CHECK(rdma_destroy_id(passive) == 0);
	CHECK(rdma_destroy_id(listen) == 0);
	rdma_destroy_event_channel(other);
}

/* Datagrams: the address handle and QP of the event are what it takes to send. */
static void a_lookup(void)
{
	static char out[64] = "datagram", in[64 + 40];
	int port;
	struct rdma_cm_id *listen = listener(server, RDMA_PS_UDP, &port);
	struct rdma_cm_id *active = routed(client, RDMA_PS_UDP, port);
	struct rdma_conn_param param = { .private_data = "where", .private_data_len = 6 };
	struct ibv_qp_attr attr;
	struct ibv_wc wc;

	create_qp(active);
	CHECK(active->qp_type == IBV_QPT_UD && qp_state(active, &attr) == IBV_QPS_RTS);
	CHECK(rdma_connect(active, &param) == 0);
	struct rdma_cm_event *event = expect(server, RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *passive = event->id;
	CHECK(event->param.ud.private_data_len == 180 && !strcmp(event->param.ud.private_data, "where"));
	CHECK(rdma_ack_cm_event(event) == 0);
	create_qp(passive);
	struct ibv_mr *in_mr = rdma_reg_msgs(passive, in, sizeof(in)), *out_mr = rdma_reg_msgs(active, out, sizeof(out));
	CHECK(in_mr && out_mr && rdma_post_recv(passive, NULL, in, sizeof(in), in_mr) == 0);
	param.qp_num = passive->qp->qp_num;
	CHECK(rdma_accept(passive, &param) == 0);
	event = expect(client, RDMA_CM_EVENT_ESTABLISHED);
	CHECK(event->param.ud.qp_num == passive->qp->qp_num && event->param.ud.qkey == RDMA_UDP_QKEY);
	CHECK(event->param.ud.private_data_len == 136);
	struct ibv_ah *ah = ibv_create_ah(active->pd, &event->param.ud.ah_attr);
	CHECK(ah);
	CHECK(rdma_post_ud_send(active, NULL, out, sizeof(out), out_mr, 0, ah, event->param.ud.qp_num) == 0);
	CHECK(rdma_get_recv_comp(passive, &wc) == 1 && wc.status == IBV_WC_SUCCESS && wc.byte_len == sizeof(in));
	CHECK(!strcmp(in + 40, "datagram"));
	CHECK(rdma_ack_cm_event(event) == 0);
	CHECK(ibv_destroy_ah(ah) == 0 && rdma_dereg_mr(in_mr) == 0 && rdma_dereg_mr(out_mr) == 0);
	rdma_destroy_qp(active);
	rdma_destroy_qp(passive);
	CHECK(rdma_destroy_id(active) == 0);
	CHECK(rdma_destroy_id(passive) == 0);
	CHECK(rdma_destroy_id(listen) == 0);
}

int main(void)
{
	client = rdma_create_event_channel();
	server = rdma_create_event_channel();
	CHECK(client && server);
	a_connection();
	a_rejection();
	a_connection_without_a_qp();
	a_lookup();
	CHECK(!is_readable(client->fd) && !is_readable(server->fd));
	rdma_destroy_event_channel(client);
	rdma_destroy_event_channel(server);
	return 0;
}
