/*
 * How this works
 *
 * One thread, one poll(2). A turn asks libslirp which sockets it waits for, waits for those and for the
 * frame socket, gives the guest's frames to libslirp, then lets it work on its sockets. What libslirp has
 * for the guest goes out at once with send(2); when the socket is full it is kept in a short backlog and,
 * until that is gone, libslirp's sockets are not looked at: the host side waits, and TCP slows down
 * instead of losing segments.
 */
#include "net/nat/nat.h"
#include <arpa/inet.h>
#include <errno.h>
#include <libslirp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include "net/nat/filter.h"
#include "net/nat/reassemble.h"
#include "net/nat/sandbox.h"
#include "vmm/cleanup.h"

#define BATCH        32                 /* frames of the guest a system call */
#define BATCHES      8                  /* before libslirp's sockets have their turn */
#define FRAME_MAX    (14 + 65535)
#define MAX_POLL     8200               /* one more than RLIMIT_NOFILE allows, and the frame socket */
#define BACKLOG      256                /* frames kept for a guest that does not take them */
#define BACKLOG_SIZE (1u << 20)         /* bytes of those */

struct frame {
	size_t len;
	uint8_t data[];
};

struct nat_timer {
	SlirpTimerId id;
	void *opaque;
	int64_t at_ms;                  /* -1: not set */
	bool used;
};

struct nat {
	Slirp *slirp;
	int frames;
	bool host_allowed, gone;
	struct nat_timer timer[SLIRP_TIMER_NUM];
	time_t resolver_looked;
	struct reassemble fragments;

	struct frame *backlog[BACKLOG]; /* a ring */
	unsigned first, waiting;
	size_t waiting_bytes;

	struct pollfd poll[MAX_POLL];
	unsigned nr_poll;

	struct mmsghdr msg[BATCH];
	struct iovec iov[BATCH];
	uint8_t buf[BATCH][FRAME_MAX + 1];
};

/* libslirp counts milliseconds in 32 bits, from 0: give it as long as can be before they wrap. */
static int64_t clock_ns(void *opaque)
{
	static int64_t base;
	struct timespec ts;
	int64_t now;

	(void)opaque;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	now = ts.tv_sec * 1000000000ll + ts.tv_nsec;
	if (!base)
		base = now;
	return now - base;
}

/* ---- to the guest ------------------------------------------------------------------------------- */

static void keep(struct nat *n, const void *data, size_t len)
{
	struct frame *f;

	if (n->waiting == BACKLOG || len > BACKLOG_SIZE - n->waiting_bytes ||
		!(f = malloc(sizeof(*f) + len)))
		return;         /* the guest takes nothing: lost, as on any network */
	f->len = len;
	memcpy(f->data, data, len);
	n->backlog[(n->first + n->waiting++) % BACKLOG] = f;
	n->waiting_bytes += len;
}

/* True: sent, or never to be sent. False: no room now. */
static bool send_frame(struct nat *n, const void *data, size_t len)
{
	ssize_t r;

	do
		r = send(n->frames, data, len, MSG_DONTWAIT | MSG_NOSIGNAL);
	while (r < 0 && errno == EINTR);
	if (r < 0 && (errno == EPIPE || errno == ECONNRESET))
		n->gone = true;
	return r >= 0 || (errno != EAGAIN && errno != ENOBUFS && errno != ENOMEM);
}

static ssize_t cb_send_packet(const void *data, size_t len, void *opaque)
{
	struct nat *n = opaque;

	if (n->waiting || !send_frame(n, data, len))
		keep(n, data, len);
	return (ssize_t)len;
}

static void send_backlog(struct nat *n)
{
	while (n->waiting) {
		struct frame *f = n->backlog[n->first];

		if (!send_frame(n, f->data, f->len))
			return;
		n->waiting_bytes -= f->len;
		n->waiting--;
		n->first = (n->first + 1) % BACKLOG;
		free(f);
	}
}

/* ---- from the guest ----------------------------------------------------------------------------- */

/* To the name server 10.0.2.3, port 53: UDP over IPv4 without options. */
static bool is_dns(const uint8_t *f, size_t len)
{
	static const uint8_t server[] = { 10, 0, 2, 3 };

	return len >= 14 + 20 + 8 && f[12] == 8 && f[13] == 0 && f[14] == 0x45 &&
		!memcmp(f + 30, server, sizeof(server)) && f[36] == 0 && f[37] == 53;
}

/*
 * A host that changed networks may have put a new resolv.conf in the place of the one we may read. Ending
 * is the cure: we are started again and may read the new one. Looked at once a second at most.
 */
static void look_at_resolver(struct nat *n)
{
	time_t now = (time_t)(clock_ns(NULL) / 1000000000);

	if (now == n->resolver_looked)
		return;
	n->resolver_looked = now;
	if (nat_resolver_lost())
		n->gone = true;
}

static void take_frame(struct nat *n, const uint8_t *frame, size_t len, bool truncated)
{
	if (truncated || nat_filter(frame, len, n->host_allowed) != NAT_PASS)
		return;
	if (frame[12] == 8 && frame[13] == 0) {         /* IPv4 */
		const uint8_t *whole = reassemble(&n->fragments, frame, &len);

		if (!whole || (whole != frame && nat_filter(whole, len, n->host_allowed) != NAT_PASS))
			return;
		frame = whole;
	}
	if (is_dns(frame, len))
		look_at_resolver(n);
	slirp_input(n->slirp, frame, (int)len);
}

static void take_frames(struct nat *n)
{
	for (unsigned k = 0; k < BATCHES; k++) {
		int got = recvmmsg(n->frames, n->msg, BATCH, MSG_DONTWAIT, NULL);

		if (got <= 0) {
			if (got == 0 || (errno != EAGAIN && errno != EINTR))
				n->gone = true;
			return;
		}
		for (int i = 0; i < got; i++) {
			if (!n->msg[i].msg_len) {       /* end of file; nobody sends empty frames */
				n->gone = true;
				return;
			}
			take_frame(n, n->buf[i], n->msg[i].msg_len,
				n->msg[i].msg_hdr.msg_flags & MSG_TRUNC);
		}
		if (got < BATCH)
			return;
	}
}

/* ---- libslirp's other callbacks ------------------------------------------------------------------ */

static void cb_guest_error(const char *msg, void *opaque)
{
	(void)msg;              /* the guest's own business, and its to repeat a million times */
	(void)opaque;
}

static void *cb_timer_new(SlirpTimerId id, void *cb_opaque, void *opaque)
{
	struct nat *n = opaque;

	for (unsigned i = 0; i < ARRAY_LEN(n->timer); i++) {
		if (!n->timer[i].used) {
			n->timer[i] = (struct nat_timer){ id, cb_opaque, -1, true };
			return &n->timer[i];
		}
	}
	return NULL;
}

static void cb_timer_free(void *timer, void *opaque)
{
	struct nat_timer *t = timer;

	(void)opaque;
	if (t)
		t->used = false;
}

static void cb_timer_mod(void *timer, int64_t at_ms, void *opaque)
{
	struct nat_timer *t = timer;

	(void)opaque;
	if (t)
		t->at_ms = at_ms;
}

static void cb_poll_fd(int fd, void *opaque)
{
	(void)fd;
	(void)opaque;
}

static void cb_notify(void *opaque)
{
	(void)opaque;           /* one thread: nobody sleeps while libslirp runs */
}

/* ---- a turn ------------------------------------------------------------------------------------- */

static const struct {
	int slirp;
	short poll;
} events_map[] = { { SLIRP_POLL_IN, POLLIN }, { SLIRP_POLL_OUT, POLLOUT },
	{ SLIRP_POLL_PRI, POLLPRI }, { SLIRP_POLL_ERR, POLLERR }, { SLIRP_POLL_HUP, POLLHUP } };

static int cb_add_poll(int fd, int events, void *opaque)
{
	struct nat *n = opaque;
	struct pollfd *p = &n->poll[n->nr_poll];

	if (n->nr_poll == MAX_POLL)
		return -1;
	*p = (struct pollfd){ fd };
	for (unsigned i = 0; i < 3; i++)        /* ERR and HUP always come */
		if (events & events_map[i].slirp)
			p->events |= events_map[i].poll;
	return (int)n->nr_poll++;
}

static int cb_get_revents(int idx, void *opaque)
{
	struct nat *n = opaque;
	int events = 0;

	if (idx < 0 || (unsigned)idx >= n->nr_poll)
		return 0;
	for (unsigned i = 0; i < ARRAY_LEN(events_map); i++)
		if (n->poll[idx].revents & events_map[i].poll)
			events |= events_map[i].slirp;
	return events;
}

/* Run the timers that are due; lower *timeout_ms to the next. */
static void run_timers(struct nat *n, uint32_t *timeout_ms)
{
	int64_t now = clock_ns(NULL) / 1000000;

	for (unsigned i = 0; i < ARRAY_LEN(n->timer); i++) {
		struct nat_timer *t = &n->timer[i];

		if (t->used && t->at_ms >= 0 && t->at_ms <= now) {
			t->at_ms = -1;
			slirp_handle_timer(n->slirp, t->id, t->opaque);
		}
		if (t->used && t->at_ms >= 0 && t->at_ms - now < *timeout_ms)
			*timeout_ms = (uint32_t)(t->at_ms > now ? t->at_ms - now : 0);
	}
}

static int turn(struct nat *n)
{
	uint32_t timeout = UINT32_MAX;
	int r;

	n->poll[0] = (struct pollfd){ n->frames, POLLIN | (n->waiting ? POLLOUT : 0) };
	n->nr_poll = 1;
	if (!n->waiting)
		slirp_pollfds_fill(n->slirp, &timeout, cb_add_poll, n);
	run_timers(n, &timeout);
	r = poll(n->poll, n->nr_poll, timeout > INT32_MAX ? -1 : (int)timeout);
	if (r < 0 && errno != EINTR)
		return -errno;
	if (n->poll[0].revents & POLLOUT)
		send_backlog(n);
	/* Before the frames: this is where libslirp looks at the clock that it dates new flows by. */
	slirp_pollfds_poll(n->slirp, r < 0, cb_get_revents, n);
	if (n->poll[0].revents & (POLLIN | POLLHUP | POLLERR))
		take_frames(n);
	return 0;
}

int nat_run(struct nat *n)
{
	int e = 0;

	while (!e && !n->gone)
		e = turn(n);
	return e;
}

/* ---- building ----------------------------------------------------------------------------------- */

static const SlirpCb callbacks = {
	.send_packet = cb_send_packet,
	.guest_error = cb_guest_error,
	.clock_get_ns = clock_ns,
	.timer_free = cb_timer_free,
	.timer_mod = cb_timer_mod,
	.register_poll_fd = cb_poll_fd,
	.unregister_poll_fd = cb_poll_fd,
	.notify = cb_notify,
	.timer_new_opaque = cb_timer_new,
};

static struct in_addr ip4(unsigned a, unsigned b, unsigned c, unsigned d)
{
	return (struct in_addr){ htonl(a << 24 | b << 16 | c << 8 | d) };
}

static Slirp *make_slirp(struct nat *n, const struct nat_config *c)
{
	SlirpConfig cfg = {
		.version = 4,
		.in_enabled = true,
		.vnetwork = ip4(10, 0, 2, 0),
		.vnetmask = ip4(255, 255, 255, 0),
		.vhost = ip4(10, 0, 2, 2),
		.vdhcp_start = ip4(10, 0, 2, 15),
		.vnameserver = ip4(10, 0, 2, 3),
		.in6_enabled = true,
		.vprefix_len = 64,
		.if_mtu = c->mtu,
		.if_mru = c->mtu,
		.disable_host_loopback = !c->host_allowed,
		.enable_emu = false,
	};

	inet_pton(AF_INET6, "fec0::", &cfg.vprefix_addr6);
	inet_pton(AF_INET6, "fec0::2", &cfg.vhost6);
	inet_pton(AF_INET6, "fec0::3", &cfg.vnameserver6);
	return slirp_new(&cfg, &callbacks, n);
}

/*
 * 0 or errno; *port is the one bound. libslirp does not say which descriptor it opened, but a process of
 * one thread is always given the lowest free one.
 */
static int bind_forward(struct nat *n, const struct nat_forward *f, uint16_t *port)
{
	struct sockaddr_in host = { .sin_family = AF_INET, .sin_addr = f->host,
		.sin_port = htons(f->port) };
	struct sockaddr_in guest = { .sin_family = AF_INET, .sin_addr = ip4(10, 0, 2, 15),
		.sin_port = htons(f->guest_port) }, bound;
	socklen_t len = sizeof(bound);
	int next = dup(n->frames);

	if (next < 0)
		return errno;
	close(next);
	errno = 0;
	if (slirp_add_hostxfwd(n->slirp, (struct sockaddr *)&host, sizeof(host),
		(struct sockaddr *)&guest, sizeof(guest), f->udp ? SLIRP_HOSTFWD_UDP : 0) < 0)
		return errno ? errno : EINVAL;
	if (getsockname(next, (struct sockaddr *)&bound, &len) < 0 || bound.sin_family != AF_INET)
		return EPROTO;
	*port = ntohs(bound.sin_port);
	return 0;
}

struct nat *nat_new(const struct nat_config *c, int frames, uint16_t *ports, int *errnum, int *which)
{
	struct nat *n = calloc(1, sizeof(*n));

	*which = -1;
	*errnum = ENOMEM;
	if (!n)
		return NULL;
	n->frames = frames;
	n->host_allowed = c->host_allowed;
	for (unsigned i = 0; i < BATCH; i++) {
		n->iov[i] = (struct iovec){ n->buf[i], sizeof(n->buf[i]) };
		n->msg[i].msg_hdr = (struct msghdr){ .msg_iov = &n->iov[i], .msg_iovlen = 1 };
	}
	n->slirp = make_slirp(n, c);
	*errnum = n->slirp ? 0 : EINVAL;
	for (unsigned i = 0; !*errnum && i < c->nr_forwards; i++) {
		*which = (int)i;
		*errnum = bind_forward(n, &c->forward[i], &ports[i]);
	}
	if (*errnum) {
		nat_free(n);
		return NULL;
	}
	return n;
}

void nat_free(struct nat *n)
{
	if (n->slirp)
		slirp_cleanup(n->slirp);
	while (n->waiting--)
		free(n->backlog[n->first++ % BACKLOG]);
	reassemble_done(&n->fragments);
	free(n);
}
