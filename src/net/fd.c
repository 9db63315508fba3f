/*
 * A socket that whoever started vmm left open: one Ethernet frame a message, no header. The other end is a
 * switch, another VM or a test.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sys/socket.h>
#include <unistd.h>
#include "net/backends.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"

#define MTU_MIN     68          /* RFC 791: what every link carries */
#define MTU_MAX     65535
#define MTU_DEFAULT 1500

static void fd_describe(struct net_backend *b, struct facts *f)
{
	(void)b;
	facts_str(f, "backend", "fd");
}

static void fd_close(struct net_backend *b)
{
	close(b->fd);
	b->fd = -1;
}

static int fd_open(struct net_backend *ret, struct vm *vm, struct opts *o, struct error *err)
{
	uint64_t fd = UINT64_MAX, mtu = MTU_DEFAULT;
	socklen_t len = sizeof(int);
	int type = 0, flags, r;

	(void)vm;
	if ((r = opts_u64(o, "fd", 3, INT_MAX, &fd, err)) ||
		(r = opts_u64(o, "mtu", MTU_MIN, MTU_MAX, &mtu, err)))
		return r;
	if (fd == UINT64_MAX)
		return error_set(err, EINVAL, "%s fd: fd=N is missing", opts_option(o));
	if (getsockopt((int)fd, SOL_SOCKET, SO_TYPE, &type, &len) ||
		(type != SOCK_DGRAM && type != SOCK_SEQPACKET))
		return error_set(err, EBADF, "%s: fd=%d is not a datagram or seqpacket socket",
			opts_option(o), (int)fd);
	flags = fcntl((int)fd, F_GETFL);
	if (flags < 0 || fcntl((int)fd, F_SETFL, flags | O_NONBLOCK) ||
		fcntl((int)fd, F_SETFD, FD_CLOEXEC))
		return error_errno(err, errno, "%s: fd=%d", opts_option(o), (int)fd);
	ret->fd = (int)fd;
	ret->framing = NET_DATAGRAM;
	ret->mtu = (uint16_t)mtu;
	ret->describe = fd_describe;
	ret->close = fd_close;
	return 0;
}

const struct net_class net_fd = {
	.name = "fd",
	.help = "fd=N, mtu=N: a socket that vmm was started with",
	.open = fd_open,
};
