/*
 * virtio-net (virtio 1.2, 5.1): one pair of queues over a back end that is a descriptor of frames.
 *
 * How this works. Transmit: chains are popped into a batch, each frame as iovecs into guest RAM behind a
 * little memory of our own where a checksum had to be filled in, and the batch goes out in one sendmmsg(2).
 * A full socket keeps the rest of the batch and stops the popping until it is writable: nothing is
 * dropped for lack of room. Receive: a window of chains is held popped, at least one largest frame wide if
 * the driver gave that much; recvmsg(2) puts a frame straight into it, and the chains it reached are
 * pushed. Without room in the window the socket is not read: the other side waits.
 *
 * Offered and why: CSUM, because with it Linux sends pages instead of copying into one large buffer, and
 * our pass over the data costs less than that copy; GUEST_CSUM, because the NAT computes the checksum of
 * all it sends, which then need not be verified; a large MTU in place of segmentation offloads.
 */
#include <endian.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_net.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/net.h"
#include "vmm/opts.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

#define QUEUE_SIZE   256
#define HEADER       sizeof(struct virtio_net_hdr_v1)
#define FRAME_MIN    ETH_HLEN
#define FRAME_MAX    (ETH_HLEN + 4 + 65535)     /* one VLAN tag */
#define TX_BATCH     64
#define TX_IOVS      1024               /* of one batch */
#define TX_FILLED    256                /* how far into a frame a checksum field may lie */
#define RX_BUFS      64                 /* chains held in the window */
#define RX_IOVS      512
#define RX_BURST     64                 /* frames before the other devices have their turn */

enum { RX, TX };

/* How the driver's buffers fared; written by the home loop alone, read by any thread. */
struct tally {
	_Atomic uint64_t frames, bytes, dropped, invalid;
};

struct tx_frame {
	uint16_t head;
	uint32_t len;
	uint8_t filled[TX_FILLED];      /* first bytes of the frame, with the checksum in them */
};

struct rx_buf {
	uint16_t head;
	uint16_t iov, nr_iov;           /* in rx_iov[] */
	uint32_t len;
};

struct net {
	struct virtio v;
	struct net_backend backend;
	struct virtio_net_config config;        /* home loop, after build */

	/* home loop only */
	/* Set with the first start. The back end may call until it is closed, when v.home is gone already. */
	struct loop *home;
	bool running;                   /* between start and stop */
	bool link;
	struct loop_fd sock;
	bool watched;

	/* a batch: frames [tx_sent, tx_nr) are not with the back end yet */
	unsigned tx_nr, tx_sent, tx_iovs;
	struct tx_frame tx[TX_BATCH];
	struct mmsghdr tx_msg[TX_BATCH];
	struct iovec tx_iov[TX_IOVS];

	/* the window: chains [rx_first, rx_end), their iovecs in order in rx_iov[] */
	unsigned rx_first, rx_end;
	size_t rx_room;                 /* bytes in it */
	struct rx_buf rx[RX_BUFS];
	struct iovec rx_iov[RX_IOVS], rx_target[RX_IOVS];

	/* any thread */
	struct tally sent, received;
};

static struct net *net_of(struct virtio *v)
{
	return container_of(v, struct net, v);
}

static void count(_Atomic uint64_t *c, uint64_t n)
{
	atomic_store_explicit(c, atomic_load_explicit(c, memory_order_relaxed) + n,
		memory_order_relaxed);
}

static void socket_ready(struct loop_fd *f, uint32_t ready);

/* Have the loop watch the back end's descriptor for these events, or for none. */
static void want(struct net *n, uint32_t events)
{
	if (n->watched && n->sock.events == events)
		return;
	if (n->watched)
		loop_del_fd(n->home, &n->sock);
	n->watched = false;
	if (!events)
		return;
	n->sock = (struct loop_fd){ .fd = n->backend.fd, .events = events, .fn = socket_ready };
	n->watched = !loop_add_fd(n->home, &n->sock);
	if (!n->watched)
		log_guest(&n->v.limit, "%s: the host cannot watch its socket", n->v.name);
}

static void want_more(struct net *n, uint32_t events)
{
	want(n, (n->watched ? n->sock.events : 0) | events);
}

static void want_less(struct net *n, uint32_t events)
{
	want(n, n->watched ? n->sock.events & ~events : 0);
}

/* ---- the checksum a driver left to us (virtio 1.2, 5.1.6.2; RFC 1071) ----------------------------- */

/* Sum of 16-bit words in memory order, not folded. */
static uint64_t sum_bytes(const uint8_t *p, size_t len)
{
	uint64_t a = 0, b = 0;
	uint16_t last = 0;

	for (; len >= 16; p += 16, len -= 16) {
		uint32_t w[4];

		memcpy(w, p, 16);
		a += (uint64_t)w[0] + w[1];
		b += (uint64_t)w[2] + w[3];
	}
	for (; len >= 2; p += 2, len -= 2) {
		uint16_t w;

		memcpy(&w, p, 2);
		a += w;
	}
	if (len)
		memcpy(&last, p, 1);
	return a + b + last;
}

static uint16_t fold(uint64_t sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return (uint16_t)sum;
}

/* Sum of all that is left of a view, as if it were one piece: a piece at an odd offset counts swapped. */
static uint16_t sum_view(struct iov_view v)
{
	uint64_t total = 0;
	bool odd = false;

	while (v.len) {
		size_t room = v.iov->iov_len - v.skip, step = MIN(room, v.len);
		uint16_t s = fold(sum_bytes((const uint8_t *)v.iov->iov_base + v.skip, step));

		total += odd ? (uint16_t)(s << 8 | s >> 8) : s;
		odd ^= step & 1;
		iov_take(&v, step);
	}
	return fold(total);
}

/*
 * Take the head of the frame up to the checksum field into our memory and complete the checksum there;
 * guest RAM is the driver's. 0, or -EINVAL if the offsets do not lie in the frame.
 */
static int fill_checksum(struct tx_frame *f, struct iov_view *frame, size_t start, size_t off,
	size_t *filled)
{
	size_t end = start + off + 2;
	uint16_t sum;
	uint64_t s;

	if (start >= frame->len || end > frame->len || end > TX_FILLED)
		return -EINVAL;
	*filled = iov_read(frame, f->filled, end);
	/* The part before end is even or odd; what follows an odd part counts swapped. */
	sum = sum_view(*frame);
	if ((end - start) & 1)
		sum = (uint16_t)(sum << 8 | sum >> 8);
	s = sum_bytes(f->filled + start, end - start) + sum;
	sum = (uint16_t)~fold(s);
	if (!sum)
		sum = 0xffff;           /* 0 means none in UDP (RFC 768); the same number in TCP */
	memcpy(f->filled + start + off, &sum, 2);
	return 0;
}

/* ---- transmit ------------------------------------------------------------------------------------- */

/* The frame of chain c as the next of the batch. 0, or -EINVAL: not a frame we take. */
static int tx_add(struct net *n, struct virtq_chain *c)
{
	struct tx_frame *f = &n->tx[n->tx_nr];
	struct iovec *iov = &n->tx_iov[n->tx_iovs];
	struct virtio_net_hdr_v1 h;
	size_t filled = 0;
	unsigned cnt;

	if (!IOV_GET(&c->out, &h) || c->out.len < FRAME_MIN || c->out.len > FRAME_MAX)
		return -EINVAL;
	if (h.gso_type != VIRTIO_NET_HDR_GSO_NONE)      /* none was offered */
		return -EINVAL;
	f->head = c->head;
	f->len = (uint32_t)c->out.len;
	if (h.flags & VIRTIO_NET_HDR_F_NEEDS_CSUM)
		if (!virtio_has(&n->v, VIRTIO_NET_F_CSUM) || fill_checksum(f, &c->out,
			le16toh(h.csum_start), le16toh(h.csum_offset), &filled))
			return -EINVAL;
	if (filled)
		iov[0] = (struct iovec){ f->filled, filled };
	cnt = filled ? 1 : 0;
	cnt += iov_export(&c->out, iov + cnt, VIRTQ_SEGS);
	n->tx_msg[n->tx_nr++].msg_hdr = (struct msghdr){ .msg_iov = iov, .msg_iovlen = cnt };
	n->tx_iovs += cnt;
	return 0;
}

/* The next k frames of the batch are with the back end, or lost. */
static void tx_done(struct net *n, unsigned k, bool lost)
{
	while (k--) {
		const struct tx_frame *f = &n->tx[n->tx_sent++];

		if (n->v.vq[TX])
			virtq_push(n->v.vq[TX], f->head, 0);
		if (lost) {
			count(&n->sent.dropped, 1);
			continue;
		}
		count(&n->sent.frames, 1);
		count(&n->sent.bytes, f->len);
	}
	if (n->tx_sent == n->tx_nr)
		n->tx_sent = n->tx_nr = n->tx_iovs = 0;
}

/* Send the batch. False: the socket is full and the loop will say when it is not. */
static bool tx_flush(struct net *n)
{
	while (n->tx_nr) {
		int r;

		if (!n->link) {
			tx_done(n, n->tx_nr - n->tx_sent, true);
			continue;
		}
		r = sendmmsg(n->backend.fd, n->tx_msg + n->tx_sent, n->tx_nr - n->tx_sent,
			MSG_DONTWAIT | MSG_NOSIGNAL);
		if (r > 0) {
			tx_done(n, (unsigned)r, false);
		} else if (errno == EAGAIN) {
			want_more(n, EPOLLOUT);
			return false;
		} else if (errno != EINTR) {
			tx_done(n, 1, true);    /* this one the back end cannot take at all */
		}
	}
	return true;
}

static void tx_run(struct net *n)
{
	struct virtq *q = n->v.vq[TX];
	struct virtq_chain c;

	if (!q || !tx_flush(n))
		return;
	while (virtq_pop(q, &c) > 0) {
		if (!c.out.len) {
			virtio_break(&n->v, "transmit buffer without a byte to send");
			break;
		}
		if (tx_add(n, &c)) {
			count(&n->sent.invalid, 1);
			virtq_push(q, c.head, 0);
		}
		if ((n->tx_nr == TX_BATCH || n->tx_iovs + VIRTQ_SEGS + 1 > TX_IOVS) && !tx_flush(n))
			return;
	}
	tx_flush(n);
}

/* ---- receive -------------------------------------------------------------------------------------- */

static bool mergeable(const struct net *n)
{
	return virtio_has(&n->v, VIRTIO_NET_F_MRG_RXBUF);
}

/* Move the window to the start of its arrays. */
static void rx_compact(struct net *n)
{
	unsigned nr = n->rx_end - n->rx_first, iov;

	if (!n->rx_first)
		return;
	if (nr) {
		const struct rx_buf *last = &n->rx[n->rx_end - 1];

		iov = n->rx[n->rx_first].iov;
		memmove(n->rx_iov, n->rx_iov + iov,
			(size_t)(last->iov + last->nr_iov - iov) * sizeof(n->rx_iov[0]));
		memmove(n->rx, n->rx + n->rx_first, nr * sizeof(n->rx[0]));
		for (unsigned i = 0; i < nr; i++)
			n->rx[i].iov = (uint16_t)(n->rx[i].iov - iov);
	}
	n->rx_first = 0;
	n->rx_end = nr;
}

/* Room for one more chain of nr_iov pieces in the arrays; where its pieces go. NULL: the window is full. */
static struct iovec *rx_place(struct net *n, unsigned nr_iov)
{
	for (int again = 0; again < 2; again++) {
		const struct rx_buf *last = n->rx_end > n->rx_first ? &n->rx[n->rx_end - 1] : NULL;
		unsigned at = last ? last->iov + last->nr_iov : 0;

		if (n->rx_end < RX_BUFS && at + nr_iov <= RX_IOVS)
			return &n->rx_iov[at];
		rx_compact(n);
	}
	return NULL;
}

/* Pop chains until the window can hold any frame. False: it cannot hold another chain. */
static bool rx_fill(struct net *n)
{
	size_t need = mergeable(n) ? HEADER + ETH_HLEN + 4 + n->backend.mtu : 1;
	struct virtq *q = n->v.vq[RX];
	struct virtq_chain c;

	while (n->rx_room < need && virtq_pop(q, &c) > 0) {
		struct rx_buf *b;
		struct iovec *iov;
		unsigned nr;

		if (c.in.len < HEADER) {
			count(&n->received.invalid, 1);
			virtq_push(q, c.head, 0);
			continue;
		}
		iov = rx_place(n, VIRTQ_SEGS);
		nr = iov ? iov_export(&c.in, iov, VIRTQ_SEGS) : 0;
		if (!nr) {
			virtq_unpop(q, &c);
			return false;
		}
		b = &n->rx[n->rx_end++];
		*b = (struct rx_buf){ c.head, (uint16_t)(iov - n->rx_iov), (uint16_t)nr,
			(uint32_t)c.in.len };
		n->rx_room += b->len;
	}
	return true;
}

/* The part of the window that the next frame, header first, may fill. */
static struct iov_view rx_view(struct net *n)
{
	const struct rx_buf *b = &n->rx[n->rx_first];

	return (struct iov_view){ .iov = &n->rx_iov[b->iov], .cnt = RX_IOVS - b->iov,
		.len = mergeable(n) ? n->rx_room : b->len };
}

/* Push the chains that a frame of len bytes behind the header reaches into. */
static void rx_give(struct net *n, struct iov_view header, size_t len)
{
	struct virtio_net_hdr_v1 h = { 0 };
	size_t left = HEADER + len;
	unsigned k = n->rx_first;

	for (size_t sum = 0; sum < left; k++)
		sum += n->rx[k].len;
	if (virtio_has(&n->v, VIRTIO_NET_F_GUEST_CSUM))
		h.flags = VIRTIO_NET_HDR_F_DATA_VALID;
	h.num_buffers = htole16((uint16_t)(k - n->rx_first));   /* 1 without merging: 5.1.6.4.1 */
	iov_write(&header, &h, sizeof(h));
	while (n->rx_first < k) {
		const struct rx_buf *b = &n->rx[n->rx_first++];
		size_t used = MIN(left, b->len);

		virtq_push(n->v.vq[RX], b->head, (uint32_t)used);
		n->rx_room -= b->len;
		left -= used;
	}
	count(&n->received.frames, 1);
	count(&n->received.bytes, len);
}

/* Length of the frame that waits in the socket, without taking it; or -errno. */
static ssize_t rx_peek(struct net *n)
{
	struct msghdr m = { 0 };
	ssize_t len = recvmsg(n->backend.fd, &m, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT);

	return len < 0 ? -errno : len;
}

static void rx_drop(struct net *n)
{
	struct msghdr m = { 0 };

	if (recvmsg(n->backend.fd, &m, MSG_DONTWAIT) >= 0)
		count(&n->received.dropped, 1);
}

/*
 * The window is smaller than the largest frame: will the one that waits fit? 1: yes. 0: no, and more room
 * cannot come, so it was dropped. -EAGAIN: wait for the driver, or for a frame.
 */
static int rx_will_fit(struct net *n, size_t room, bool full)
{
	ssize_t len = rx_peek(n);

	if (len < 0)
		return (int)len;
	if ((size_t)len <= room)
		return 1;
	if (mergeable(n) && !full && n->rx_end - n->rx_first < n->v.cfg[RX].size)
		return -ENOBUFS;
	rx_drop(n);
	return 0;
}

/*
 * One frame from the socket to the driver. 0: done, look again. -EAGAIN: no frame. -ENOBUFS: no room.
 * Else -errno, -EPIPE for the end: the back end is gone.
 */
static int rx_one(struct net *n)
{
	bool full = !rx_fill(n);
	struct iov_view v, header;
	struct msghdr m = { .msg_iov = n->rx_target };
	ssize_t len;
	int r;

	if (n->rx_first == n->rx_end)
		return -ENOBUFS;
	v = rx_view(n);
	header = iov_take(&v, HEADER);
	if (v.len < FRAME_MAX - 65535 + (size_t)n->backend.mtu) {
		r = rx_will_fit(n, v.len, full);
		if (r <= 0)
			return r;
	}
	v.len = MIN(v.len, (size_t)FRAME_MAX);
	m.msg_iovlen = iov_export(&v, n->rx_target, RX_IOVS);
	len = recvmsg(n->backend.fd, &m, MSG_DONTWAIT);
	if (len <= 0)
		return len < 0 ? -errno : -EPIPE;
	if (len < FRAME_MIN || m.msg_flags & MSG_TRUNC) {
		count(&n->received.dropped, 1);
		return 0;
	}
	rx_give(n, header, (size_t)len);
	return 0;
}

static void rx_run(struct net *n)
{
	int r = 0;

	if (!n->v.vq[RX] || !n->link)
		return;
	for (unsigned i = 0; i < RX_BURST && !n->v.broken && (!r || r == -EINTR); i++)
		r = rx_one(n);
	if (n->v.broken || (r && r != -EAGAIN && r != -EINTR))
		want_less(n, EPOLLIN);  /* until there is room, or the link comes up again */
	else
		want_more(n, EPOLLIN);
}

/* ---- life ----------------------------------------------------------------------------------------- */

static void socket_ready(struct loop_fd *f, uint32_t ready)
{
	struct net *n = container_of(f, struct net, sock);

	if (ready & EPOLLOUT || (ready & (EPOLLERR | EPOLLHUP) && n->tx_nr)) {
		want_less(n, EPOLLOUT);
		tx_run(n);
	}
	if (ready & EPOLLIN)
		rx_run(n);
	else if (ready & (EPOLLERR | EPOLLHUP) && n->watched && !(n->sock.events & EPOLLOUT))
		want(n, 0);             /* nobody there; the back end will say when somebody is */
}

static void net_notify(struct virtio *v, struct virtq *q)
{
	struct net *n = net_of(v);

	ON_LOOP(v->home);
	if (virtq_index(q) == TX)
		tx_run(n);
	else
		rx_run(n);
}

static void set_link(void *arg, bool up)
{
	struct net *n = arg;

	ON_LOOP(n->home);
	n->link = up;
	n->config.status = htole16(up ? VIRTIO_NET_S_LINK_UP : 0);
	virtio_config_set(&n->v, offsetof(struct virtio_net_config, status), &n->config.status,
		sizeof(n->config.status));
	virtio_config_changed(&n->v);
	want(n, 0);
	if (!n->running)
		return;
	tx_run(n);              /* down: what waits is lost, like the rest from now on */
	rx_run(n);
}

static int net_start(struct virtio *v)
{
	struct net *n = net_of(v);
	int r = 0;

	ON_LOOP(v->home);
	if (!n->home && n->backend.start)
		r = n->backend.start(&n->backend, v->home);
	if (r)
		return r;
	n->home = v->home;
	n->running = true;
	return 0;
}

static void net_stop(struct virtio *v)
{
	struct net *n = net_of(v);

	ON_LOOP(v->home);
	want(n, 0);
	n->running = false;
	n->tx_nr = n->tx_sent = n->tx_iovs = 0;
	n->rx_first = n->rx_end = 0;
	n->rx_room = 0;
}

static void tally_facts(struct facts *f, const char *key, const struct tally *t)
{
	struct facts *o = facts_object(f, key);

	facts_u64(o, "frames", t->frames);
	facts_u64(o, "bytes", t->bytes);
	facts_u64(o, "dropped", t->dropped);
	facts_u64(o, "invalid", t->invalid);
}

static void net_facts(struct virtio *v, struct facts *f)
{
	struct net *n = net_of(v);
	char mac[18];

	snprintf(mac, sizeof(mac), "%02x:%02x:%02x:%02x:%02x:%02x", n->config.mac[0],
		n->config.mac[1], n->config.mac[2], n->config.mac[3], n->config.mac[4],
		n->config.mac[5]);
	facts_str(f, "mac", mac);
	tally_facts(f, "sent", &n->sent);
	tally_facts(f, "received", &n->received);
	if (n->backend.describe)
		n->backend.describe(&n->backend, f);
}

/* The helper ends when its spawner does: nobody is to take that for an accident. */
static void net_finish(struct virtio *v)
{
	struct net *n = net_of(v);

	if (n->backend.close)
		n->backend.close(&n->backend);
	n->backend.close = NULL;
}

static void net_free(struct virtio *v)
{
	net_finish(v);
	free(net_of(v));
}

static const struct virtio_ops net_ops = {
	.name = "net",
	.id = VIRTIO_ID_NET,
	.start = net_start,
	.stop = net_stop,
	.notify = net_notify,
	.facts = net_facts,
	.finish = net_finish,
	.free = net_free,
};

/* ---- creation ------------------------------------------------------------------------------------- */

/* mac=, or the n-th of QEMU's range, so that a guest's configuration fits both. */
static int read_mac(struct net *n, struct vm *vm, struct opts *o, struct error *err)
{
	static const uint8_t first[ETH_ALEN] = { 0x52, 0x54, 0x00, 0x12, 0x34, 0x56 };
	const char *text = opts_str(o, "mac");
	uint8_t *mac = n->config.mac;
	int used = 0;

	memcpy(mac, first, sizeof(first));
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		mac[5] = (uint8_t)(mac[5] + (vm->virtio[i]->ops == &net_ops));
	if (!text)
		return 0;
	if (strlen(text) != 17 || strspn(text, "0123456789abcdefABCDEF:") != 17 ||
		sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", &mac[0], &mac[1], &mac[2],
			&mac[3], &mac[4], &mac[5], &used) != 6 || used != 17)
		return error_set(err, EINVAL, "%s: mac=%s: expected a form like 52:54:00:12:34:56",
			opts_option(o), text);
	if (mac[0] & 1 || !memcmp(mac, "\0\0\0\0\0", ETH_ALEN))
		return error_set(err, EINVAL, "%s: mac=%s: not the address of one station",
			opts_option(o), text);
	return 0;
}

static void init(struct net *n)
{
	uint64_t features = 1ull << VIRTIO_NET_F_MAC | 1ull << VIRTIO_NET_F_STATUS |
		1ull << VIRTIO_NET_F_MTU | 1ull << VIRTIO_NET_F_MRG_RXBUF | 1ull << VIRTIO_NET_F_CSUM |
		1ull << VIRTIO_NET_F_GUEST_CSUM;
	const unsigned len = offsetof(struct virtio_net_config, mtu) + sizeof(n->config.mtu);

	virtio_init(&n->v, &net_ops, features, len);
	virtio_add_queue(&n->v, QUEUE_SIZE);
	virtio_add_queue(&n->v, QUEUE_SIZE);
	n->link = true;
	n->config.status = htole16(VIRTIO_NET_S_LINK_UP);
	n->config.max_virtqueue_pairs = htole16(1);
	n->config.mtu = htole16(n->backend.mtu);
	virtio_config_set(&n->v, 0, &n->config, len);
	n->backend.link = set_link;
	n->backend.link_arg = n;
}

static int net_create(struct vm *vm, struct opts *o, struct error *err)
{
	struct net *n = calloc(1, sizeof(*n));
	int r;

	if (!n)
		return error_set(err, ENOMEM, "out of memory");
	r = read_mac(n, vm, o, err);
	if (!r)
		r = net_open(&n->backend, vm, o, err);
	if (!r)
		r = opts_end(o, err);
	if (!r) {
		init(n);
		r = vm_add_virtio(vm, &n->v, err);
	}
	if (r)
		net_free(&n->v);
	return r;
}

const struct device_class net_class = {
	.name = "net",
	.help = "user (fwd=tcp|udp:[HOST:]PORT:GUESTPORT, host=allow, mtu=N), fd (fd=N, mtu=N); mac=MAC",
	.implied = "backend",
	.create = net_create,
};
