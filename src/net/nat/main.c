/*
 * vmm-nat: user-mode network address translation for one NIC of one VM. Started by vmm with the frame
 * socket as descriptor 3 and the control socket as 4 (config.h); not meant to be run by hand. It ends when
 * the frame socket is closed.
 */
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include "net/nat/config.h"
#include "net/nat/nat.h"
#include "net/nat/sandbox.h"

/* libslirp reports through glib, mostly what a guest did wrong: nobody's news. */
static void ignore_log(const char *domain, GLogLevelFlags level, const char *msg, void *data)
{
	(void)domain;
	(void)level;
	(void)msg;
	(void)data;
}

static void answer(const char *text)
{
	if (send(NAT_CONTROL_FD, text, strlen(text), MSG_NOSIGNAL) < 0)
		return;         /* vmm does not wait for an answer it does not need */
}

static int read_config(struct nat_config *c)
{
	char text[NAT_TEXT_MAX + 1];
	ssize_t n;

	do
		n = recv(NAT_CONTROL_FD, text, sizeof(text) - 1, 0);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		return n < 0 ? -errno : -ENODATA;
	text[n] = '\0';
	return nat_config_parse(c, text);
}

static void answer_ok(const struct nat_config *c, const uint16_t *ports)
{
	char text[16 + NAT_FORWARDS * 8];
	int n = snprintf(text, sizeof(text), "ok");

	for (unsigned i = 0; i < c->nr_forwards; i++)
		n += snprintf(text + n, sizeof(text) - (size_t)n, " %u", ports[i]);
	answer(text);
}

static int fail(int which, const char *what, int e)
{
	char text[256];

	snprintf(text, sizeof(text), "error %d %s%s%s", which, what, *what ? ": " : "", strerror(e));
	answer(text);
	return 1;
}

static void prepare(void)
{
	static const int ignored[] = { SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE };

	/* vmm decides when the guest's network ends. */
	for (unsigned i = 0; i < G_N_ELEMENTS(ignored); i++)
		signal(ignored[i], SIG_IGN);
	mallopt(M_ARENA_MAX, 1);
	mallopt(M_TRIM_THRESHOLD, 512 << 10);
	mallopt(M_MMAP_THRESHOLD, 256 << 10);
	g_log_set_default_handler(ignore_log, NULL);
	nat_limit();
}

int main(void)
{
	uint16_t ports[NAT_FORWARDS];
	struct nat_config c;
	int e, which;
	const char *what;
	struct nat *n;

	if (fcntl(NAT_FRAME_FD, F_GETFD) < 0 || fcntl(NAT_CONTROL_FD, F_GETFD) < 0) {
		fputs("vmm-nat: started by vmm, not by hand\n", stderr);
		return 2;
	}
	prepare();
	e = read_config(&c);
	if (e)
		return fail(-1, "configuration", -e);
	n = nat_new(&c, NAT_FRAME_FD, ports, &e, &which);
	if (!n)
		return fail(which, which < 0 ? "libslirp" : "", e);
	e = nat_confine(&what);
	if (e) {
		nat_free(n);
		return fail(-1, what, -e);
	}
	answer_ok(&c, ports);
	close(NAT_CONTROL_FD);
	e = nat_run(n);
	nat_free(n);
	return e ? 1 : 0;
}
