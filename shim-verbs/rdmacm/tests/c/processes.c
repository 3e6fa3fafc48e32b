/* Forks and deaths: the child's calls on inherited ids fail, its own work, and the other end hears of its death. */
#include "cm.h"
#include <signal.h>
#include <sys/wait.h>

static void end_well(pid_t pid)
{
	int status;
	CHECK(waitpid(pid, &status, 0) == pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void inherited_ids_are_dead(struct rdma_event_channel *channel, struct rdma_cm_id *listen)
{
	struct rdma_cm_id *id;
	struct rdma_cm_event *event;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid > 0) {
		end_well(pid);
		return;
	}
	CHECK_FAILS(rdma_create_id(channel, &id, NULL, RDMA_PS_TCP), ENODEV);
	CHECK_FAILS(rdma_listen(listen, 1), ENODEV);
	CHECK_FAILS(rdma_get_cm_event(channel, &event), ENODEV);
	CHECK(rdma_destroy_id(listen) == 0);
	rdma_destroy_event_channel(channel);
	_exit(0);
}

/* A child that connects, waits for a byte, and does what `last` says. */
static pid_t connecting_child(int port, int *to, int accepted)
{
	int pipes[2];
	char byte;

	CHECK(pipe(pipes) == 0);
	pid_t pid = fork();
	CHECK(pid >= 0);
	if (pid > 0) {
		close(pipes[0]);
		*to = pipes[1];
		return pid;
	}
	close(pipes[1]);
	struct rdma_event_channel *own = rdma_create_event_channel();
	CHECK(own);
	struct rdma_cm_id *id = routed(own, RDMA_PS_TCP, port);
	struct rdma_conn_param param = { .qp_num = 1 };
	CHECK(rdma_connect(id, &param) == 0);
	if (accepted) {
		CHECK(rdma_ack_cm_event(expect(own, RDMA_CM_EVENT_CONNECT_RESPONSE)) == 0);
		CHECK(rdma_establish(id) == 0);
	}
	(void)!read(pipes[0], &byte, 1);
	_exit(0);
}

static struct rdma_cm_id *request(struct rdma_event_channel *channel)
{
	struct rdma_cm_event *event = expect(channel, RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *id = event->id;
	CHECK(rdma_ack_cm_event(event) == 0);
	return id;
}

int main(void)
{
	int port, pipe, status;
	struct rdma_conn_param param = { .qp_num = 2 };
	struct rdma_event_channel *channel = rdma_create_event_channel();
	CHECK(channel);
	struct rdma_cm_id *listen = listener(channel, RDMA_PS_TCP, &port);

	inherited_ids_are_dead(channel, listen);

	/* Killed with its request unanswered, then with the connection standing. */
	pid_t pid = connecting_child(port, &pipe, 0);
	struct rdma_cm_id *id = request(channel);
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_REJECTED)) == 0);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(waitpid(pid, &status, 0) == pid);
	close(pipe);

	pid = connecting_child(port, &pipe, 1);
	id = request(channel);
	CHECK(rdma_accept(id, &param) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_ESTABLISHED)) == 0);
	/* A fork in the middle changes nothing for the parent. */
	pid_t idle = fork();
	CHECK(idle >= 0);
	if (idle == 0)
		_exit(0);
	end_well(idle);
	CHECK(!is_readable(channel->fd));
	CHECK(kill(pid, SIGKILL) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_DISCONNECTED)) == 0);
	CHECK(rdma_disconnect(id) == 0);
	CHECK(rdma_ack_cm_event(expect(channel, RDMA_CM_EVENT_TIMEWAIT_EXIT)) == 0);
	CHECK(rdma_destroy_id(id) == 0);
	CHECK(waitpid(pid, &status, 0) == pid);
	close(pipe);
	CHECK(rdma_destroy_id(listen) == 0);
	rdma_destroy_event_channel(channel);
	return 0;
}
