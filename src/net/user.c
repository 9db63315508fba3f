/*
 * How this works
 *
 * Two socket pairs are made while the VM is built, frames and control, and both ends of both stay open here
 * for the life of the NIC: the helper works on copies. So a helper that died is replaced by starting
 * another on the same sockets: the NIC's descriptor stays, nothing has to be opened behind the sandbox,
 * and the helper still sees the end of its frame socket when this process is gone, with all ends.
 *
 *                 open()                    pidfd readable              worker: start, answer "ok"
 *      nothing ---------> running, link up --------------> link down -----------------------------> link up
 *                                                    ^          |
 *                                                    '----------'  it failed: again when the budget allows
 *
 * The budget: a burst of RESTART_BURST restarts at once, then one each RESTART_PERIOD (three a minute). Only
 * the wait grows, it never gives up.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>
#include "net/backends.h"
#include "net/nat/config.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/log.h"
#include "vmm/loop.h"
#include "vmm/opts.h"
#include "vmm/spawner.h"
#include "vmm/vm.h"

#define HELPER           "vmm-nat"
#define ANSWER_MS        5000
#define SOCKET_BUFFER    (1 << 20)
#define RESTART_BURST    5
#define RESTART_PERIOD   20000000000ull /* ns */

enum end { NEAR, FAR };         /* ours; the helper's */

struct user {
	/* const after open() */
	struct net_backend *b;
	struct spawner *spawner;
	unsigned command;
	struct nat_config cfg;          /* ports are what was bound the first time */
	int frames[2], control[2];      /* by enum end */

	/* home loop only, once started */
	struct loop *home;
	struct loop_fd watch;           /* the helper's pidfd; -1: none runs */
	bool watching;
	struct loop_timer again;
	uint64_t budget_ns;             /* when the restart budget will be whole again */
	struct loop_op work;
	bool working, closing, idle;    /* idle: closing and nothing under way */

	/* the worker's while working */
	int new_pidfd;
	struct error why;

	/* any thread */
	_Atomic unsigned restarts;
};

/* ---- starting the helper: main thread while the VM is built, then a worker ------------------------ */

/* What an earlier helper did not read, or said too late. */
static void drain(int fd)
{
	char junk[NAT_TEXT_MAX];

	while (recv(fd, junk, sizeof(junk), MSG_DONTWAIT) >= 0)
		;
}

/* A pidfd or -errno. */
static int launch(struct user *u, struct error *err)
{
	int fds[] = { u->frames[FAR], u->control[FAR] }, r;
	char text[NAT_TEXT_MAX];

	drain(u->control[NEAR]);
	drain(u->control[FAR]);
	r = nat_config_print(&u->cfg, text, sizeof(text));
	if (!r && send(u->control[NEAR], text, strlen(text), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
		r = -errno;
	if (!r)
		r = spawner_run(u->spawner, u->command, fds, ARRAY_LEN(fds));
	return r < 0 ? error_errno(err, -r, "cannot start %s", HELPER) : r;
}

/* "error 2 Address already in use" */
static int refused(const struct user *u, const char *text, struct error *err)
{
	char host[INET_ADDRSTRLEN];
	int which, used = 0;

	if (sscanf(text, "error %d %n", &which, &used) != 1 || !used)
		return error_set(err, EPROTO, "%s answers nonsense", HELPER);
	if (which < 0 || (unsigned)which >= u->cfg.nr_forwards)
		return error_set(err, EIO, "%s: %s", HELPER, text + used);
	inet_ntop(AF_INET, &u->cfg.forward[which].host, host, sizeof(host));
	return error_set(err, EADDRINUSE, "cannot listen on %s port %s:%u: %s",
		u->cfg.forward[which].udp ? "udp" : "tcp", host, u->cfg.forward[which].port, text + used);
}

/* Wait for "ok PORT PORT …"; the ports bound go into cfg. pidfd: readable if the helper ended. */
static int await_answer(struct user *u, int pidfd, struct error *err)
{
	struct pollfd p[] = { { u->control[NEAR], POLLIN }, { pidfd, POLLIN } };
	char text[NAT_TEXT_MAX + 1], *at;
	ssize_t n;
	int r;

	do
		r = poll(p, ARRAY_LEN(p), ANSWER_MS);
	while (r < 0 && errno == EINTR);
	n = recv(u->control[NEAR], text, sizeof(text) - 1, MSG_DONTWAIT);
	if (n <= 0)
		return error_set(err, r ? EIO : ETIMEDOUT, r ? "%s ended at once" : "%s does not answer",
			HELPER);
	text[n] = '\0';
	if (strncmp(text, "ok", 2))
		return refused(u, text, err);
	at = text + 2;
	for (unsigned i = 0; i < u->cfg.nr_forwards; i++) {
		unsigned port;
		int used;

		if (sscanf(at, " %5u%n", &port, &used) != 1 || !port || port > 65535)
			return error_set(err, EPROTO, "%s answers nonsense", HELPER);
		u->cfg.forward[i].port = (uint16_t)port;
		at += used;
	}
	return 0;
}

/* ---- watching it: home loop ----------------------------------------------------------------------- */

static void restart(struct loop_timer *t);

/* GCRA: budget_ns is when all restarts of the burst are to be had again. */
static void restart_later(struct user *u)
{
	uint64_t now = loop_now(), slack = (RESTART_BURST - 1) * RESTART_PERIOD;
	uint64_t at = u->budget_ns > now + slack ? u->budget_ns - slack : now;

	u->budget_ns = MAX(u->budget_ns, at) + RESTART_PERIOD;
	u->again.fn = restart;
	loop_set_timer(u->home, &u->again, at);
	log_warn("--net user: the NAT helper is gone; starting it again%s",
		at > now ? " in a while" : "");
}

static void ended(struct loop_fd *f, uint32_t ready)
{
	struct user *u = container_of(f, struct user, watch);

	(void)ready;
	loop_del_fd(u->home, f);
	u->watching = false;
	close(TAKE_FD(f->fd));
	u->b->link(u->b->link_arg, false);
	restart_later(u);
}

static int watch(struct user *u, int pidfd)
{
	int r;

	u->watch = (struct loop_fd){ .fd = pidfd, .events = EPOLLIN, .fn = ended };
	r = loop_add_fd(u->home, &u->watch);
	u->watching = !r;
	return r;
}

/* Worker thread. */
static int restart_work(struct loop_op *op)
{
	struct user *u = container_of(op, struct user, work);
	int pidfd = launch(u, &u->why);

	u->new_pidfd = pidfd;
	return pidfd < 0 ? pidfd : await_answer(u, pidfd, &u->why);
}

static void restarted(struct loop_op *op, int res)
{
	struct user *u = container_of(op, struct user, work);
	bool up = !res && !u->closing;

	u->working = false;
	u->idle = u->closing;
	if (res)
		log_warn("--net user: %s", u->why.msg);
	if (up)
		atomic_fetch_add(&u->restarts, 1);
	/* One that did not say "ok" is watched too: it ends by itself or with us, and only then comes another. */
	if (!u->closing && u->new_pidfd >= 0 && !watch(u, TAKE_FD(u->new_pidfd))) {
		if (up)
			u->b->link(u->b->link_arg, true);
		return;
	}
	if (u->new_pidfd >= 0)
		close(TAKE_FD(u->new_pidfd));
	if (!u->closing)
		restart_later(u);
}

static void restart(struct loop_timer *t)
{
	struct user *u = container_of(t, struct user, again);

	u->working = true;
	u->work = (struct loop_op){ .kind = OP_WORK, .work = restart_work, .done = restarted };
	loop_submit(u->home, &u->work);
}

static int user_start(struct net_backend *b, struct loop *home)
{
	struct user *u = b->priv;

	u->home = home;
	return watch(u, u->watch.fd);
}

static void close_here(void *arg)
{
	struct user *u = arg;

	u->closing = true;
	loop_del_timer(u->home, &u->again);
	if (u->watching)
		loop_del_fd(u->home, &u->watch);
	if (u->working)
		loop_drain(u->home, &u->idle);
}

/* ---- main thread ---------------------------------------------------------------------------------- */

static void user_close(struct net_backend *b)
{
	struct user *u = b->priv;

	if (u->home)
		loop_call(u->home, close_here, u);
	if (u->watch.fd >= 0)
		close(u->watch.fd);
	for (int i = 0; i < 2; i++) {
		if (u->frames[i] >= 0)
			close(u->frames[i]);
		if (u->control[i] >= 0)
			close(u->control[i]);
	}
	b->fd = -1;
	b->priv = NULL;
	free(u);
}

static void user_describe(struct net_backend *b, struct facts *f)
{
	struct user *u = b->priv;

	facts_str(f, "backend", "user");
	facts_u64(f, "restarts", atomic_load(&u->restarts));
	for (unsigned i = 0; i < u->cfg.nr_forwards; i++) {
		const struct nat_forward *w = &u->cfg.forward[i];
		struct facts *item = facts_item(f, "forwards");
		char host[INET_ADDRSTRLEN];

		inet_ntop(AF_INET, &w->host, host, sizeof(host));
		facts_str(item, "protocol", w->udp ? "udp" : "tcp");
		facts_str(item, "host", host);
		facts_u64(item, "port", w->port);
		facts_u64(item, "guest_port", w->guest_port);
	}
}

static void announce(const struct nat_config *c)
{
	for (unsigned i = 0; i < c->nr_forwards; i++) {
		const struct nat_forward *w = &c->forward[i];
		char host[INET_ADDRSTRLEN];

		inet_ntop(AF_INET, &w->host, host, sizeof(host));
		log_warn("forwarding %s %s:%u -> guest %u", w->udp ? "udp" : "tcp", host, w->port,
			w->guest_port);
	}
}

/* A port: all digits, at least min, at most 65535. */
static bool parse_port(const char *s, unsigned min, uint16_t *port)
{
	uint64_t v;

	if ((s[0] == '0' && s[1]) || parse_u64(s, &v) || v < min || v > 65535)
		return false;
	*port = (uint16_t)v;
	return true;
}

/* [HOST:]PORT; an empty or missing HOST is the loopback. */
static bool parse_host_port(char *s, struct nat_forward *w)
{
	char *colon = strrchr(s, ':');

	w->host.s_addr = htonl(INADDR_LOOPBACK);
	if (!colon)
		return parse_port(s, 0, &w->port);
	*colon = '\0';
	return (!*s || inet_pton(AF_INET, s, &w->host) == 1) && parse_port(colon + 1, 0, &w->port);
}

/*
 * fwd: tcp|udp:[HOST:]PORT:GUESTPORT. hostfwd, as QEMU has it: tcp|udp:[HOST]:PORT-[GUEST]:GUESTPORT, where
 * GUEST can only be the one address we give.
 */
static bool parse_forward(const char *text, bool qemu, struct nat_forward *w)
{
	auto_free char *copy = strdup(text);
	char *host = copy, *guest;

	if (!copy || (strncmp(copy, "tcp:", 4) && strncmp(copy, "udp:", 4)))
		return false;
	w->udp = copy[0] == 'u';
	host += 4;
	guest = strrchr(host, ':');
	if (!guest)
		return false;
	*guest++ = '\0';
	if (qemu) {
		char *dash = strchr(host, '-');

		if (!dash || (dash[1] && strcmp(dash + 1, "10.0.2.15")))
			return false;
		*dash = '\0';
	}
	return parse_port(guest, 1, &w->guest_port) && parse_host_port(host, w);
}

static bool overlap(const struct nat_forward *a, const struct nat_forward *b)
{
	return a->udp == b->udp && a->port && a->port == b->port &&
		(a->host.s_addr == b->host.s_addr || !a->host.s_addr || !b->host.s_addr);
}

static int read_forwards(struct nat_config *c, struct opts *o, const char *key, struct error *err)
{
	bool qemu = key[0] == 'h';
	const char *text;

	for (unsigned n = 0; (text = opts_nth(o, key, n)); n++) {
		struct nat_forward *w = &c->forward[c->nr_forwards];

		if (c->nr_forwards == NAT_FORWARDS)
			return error_set(err, EINVAL, "%s: more than %d forwards", opts_option(o),
				NAT_FORWARDS);
		if (!parse_forward(text, qemu, w))
			return error_set(err, EINVAL, "%s: %s=%s: expected %s, HOST an IPv4 address",
				opts_option(o), key, text, qemu ? "tcp|udp:[HOST]:PORT-:GUESTPORT" :
				"tcp|udp:[HOST:]PORT:GUESTPORT");
		for (unsigned i = 0; i < c->nr_forwards; i++)
			if (overlap(&c->forward[i], w))
				return error_set(err, EINVAL, "%s: %s=%s: port %u is forwarded twice",
					opts_option(o), key, text, w->port);
		c->nr_forwards++;
	}
	return 0;
}

static int read_options(struct nat_config *c, struct opts *o, struct error *err)
{
	static const char *const words[] = { "deny", "allow", NULL };
	uint64_t mtu = NAT_MTU_MAX;
	int host = 0, r;

	if ((r = opts_choice(o, "host", words, &host, err)) ||
		(r = opts_u64(o, "mtu", NAT_MTU_MIN, NAT_MTU_MAX, &mtu, err)) ||
		(r = read_forwards(c, o, "fwd", err)) || (r = read_forwards(c, o, "hostfwd", err)))
		return r;
	c->host_allowed = host;
	c->mtu = (unsigned)mtu;
	return 0;
}

static int make_sockets(struct user *u, struct error *err)
{
	int size = SOCKET_BUFFER;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, u->frames) < 0 ||
		socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, u->control) < 0 ||
		fcntl(u->frames[NEAR], F_SETFL, O_RDWR | O_NONBLOCK) < 0)
		return error_errno(err, errno, "cannot make a socket pair");
	for (int i = 0; i < 2; i++)     /* as much as we may: less is slower, not wrong */
		if (setsockopt(u->frames[i], SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)) < 0)
			setsockopt(u->frames[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
	return 0;
}

/* Forwards are bound before the guest starts, or vmm says why not. Without any, nobody has to wait. */
static int first_start(struct user *u, struct error *err)
{
	int r = make_sockets(u, err);

	if (r)
		return r;
	u->watch.fd = launch(u, err);
	if (u->watch.fd < 0)
		return u->watch.fd;
	return u->cfg.nr_forwards ? await_answer(u, u->watch.fd, err) : 0;
}

static int user_prepare(struct spawner *s, struct error *err)
{
	const char *argv[] = { NULL, NULL };
	char path[4096];
	int r;

	if (spawner_find(s, HELPER) >= 0)
		return 0;
	if (helper_path(HELPER, path, sizeof(path)))
		return error_set(err, ENOENT, "--net user: %s is neither beside vmm nor in its libexec/vmm "
			"(--net none runs without)", HELPER);
	argv[0] = path;
	r = spawner_add(s, argv, err);
	return r < 0 ? r : 0;
}

static int user_open(struct net_backend *ret, struct vm *vm, struct opts *o, struct error *err)
{
	struct user *u = calloc(1, sizeof(*u));
	int command = vm->spawner ? spawner_find(vm->spawner, HELPER) : -ENOENT, r;

	if (!u)
		return error_set(err, ENOMEM, "out of memory");
	u->b = ret;
	u->spawner = vm->spawner;
	u->watch.fd = u->frames[NEAR] = u->frames[FAR] = u->control[NEAR] = u->control[FAR] = -1;
	ret->priv = u;
	r = read_options(&u->cfg, o, err);
	if (!r && command < 0)
		r = error_set(err, ENOENT, "%s: %s was not registered", opts_option(o), HELPER);
	if (!r) {
		u->command = (unsigned)command;
		r = first_start(u, err);
		if (r)
			error_prefix(err, "%s user: ", opts_option(o));
	}
	if (r) {
		user_close(ret);
		return r;
	}
	announce(&u->cfg);
	*ret = (struct net_backend){ .fd = u->frames[NEAR], .framing = NET_DATAGRAM,
		.mtu = (uint16_t)u->cfg.mtu, .start = user_start, .describe = user_describe,
		.close = user_close, .priv = u };
	return 0;
}

const struct net_class net_user = {
	.name = "user",
	.help = "fwd=tcp|udp:[HOST:]PORT:GUESTPORT, host=allow|deny, mtu=N",
	.prepare = user_prepare,
	.open = user_open,
};
