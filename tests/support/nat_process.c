#include "nat_process.h"
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "vmm/error.h"
#include "vmm/spawner.h"

bool nat_helper(char *buf, size_t len)
{
	char exe[2048], *slash;
	ssize_t n = readlink("/proc/self/exe", exe, sizeof(exe) - 1);

	exe[n > 0 ? n : 0] = '\0';
	slash = strrchr(exe, '/');
	if (!slash)
		return false;
	*slash = '\0';
	snprintf(buf, len, "%s/../../vmm-nat", exe);
	return !access(buf, X_OK);
}

void nat_start(struct nat_process *p, const char *config)
{
	int frames[2], control[2];
	struct pollfd ready;
	struct error err;
	char path[4096];
	const char *const argv[] = { path, NULL };
	ssize_t n;

	memset(p, 0, sizeof(*p));
	ck_assert(nat_helper(path, sizeof(path)));
	ck_assert(!spawner_new(&p->spawner, &err) && !spawner_add(p->spawner, argv, &err));
	ck_assert(!spawner_seal(p->spawner, &err));
	ck_assert(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, frames));
	ck_assert(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, control));
	ck_assert_int_gt(send(control[0], config, strlen(config), 0), 0);
	p->pidfd = spawner_run(p->spawner, 0, (int[]){ frames[1], control[1] }, 2);
	ck_assert_int_ge(p->pidfd, 0);
	close(frames[1]);
	close(control[1]);
	p->g.fd = frames[0];
	ready = (struct pollfd){ control[0], POLLIN };
	ck_assert_int_eq(poll(&ready, 1, GUEST_WAIT_MS), 1);
	n = recv(control[0], p->answer, sizeof(p->answer) - 1, 0);
	ck_assert_msg(n > 0, "vmm-nat ended without a word");
	close(control[0]);
}

void nat_stop(struct nat_process *p)
{
	struct pollfd ended = { p->pidfd, POLLIN };

	close(p->g.fd);
	ck_assert_msg(poll(&ended, 1, GUEST_WAIT_MS) == 1, "vmm-nat outlives its socket");
	close(p->pidfd);
	spawner_free(p->spawner);
}

int nat_pid(const struct nat_process *p)
{
	char path[64], line[128];
	int pid = -1;
	FILE *f;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", p->pidfd);
	f = fopen(path, "re");
	while (f && fgets(line, sizeof(line), f))
		if (sscanf(line, "Pid: %d", &pid) == 1)
			break;
	if (f)
		fclose(f);
	return pid;
}

bool nat_alive(struct nat_process *p, int ms)
{
	for (int left = ms; left > 0; left -= 200) {    /* an answer may have been lost in a flood */
		guest_arp(&p->g, GATEWAY_IP);
		if (guest_wait_arp(&p->g, GATEWAY_IP, left < 200 ? left : 200))
			return true;
	}
	return false;
}
