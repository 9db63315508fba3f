/*
 * Consoles and named ports (virtio 1.2, 5.3).
 *
 * How this works: one device carries every --console as a port. The first create() counts them in the VM's
 * configuration, so that the device has the queues of all; each create() then fills the next port. Port 0
 * is the first console without a name, hvc0 in Linux; named ports are /dev/virtio-ports/NAME there. A single
 * console without a name needs no control queues: MULTIPORT is not even offered.
 *
 * What the driver must be told about a port is a set of bits, sent in their order whenever the driver has
 * room for it, so that a driver that asks without listening costs nothing:
 *
 *      DEVICE_READY -> ADD;   PORT_READY -> CONSOLE, RESIZE or NAME, OPEN;   peer came or went -> OPEN
 *
 * Input waits at the host until the driver opened the port and has taken what is here (fifo). Output is
 * copied to the chardev, which never makes the guest wait.
 */
#include <ctype.h>
#include <endian.h>
#include <errno.h>
#include <linux/virtio_console.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "vmm/chardev.h"
#include "vmm/cleanup.h"
#include "vmm/error.h"
#include "vmm/facts.h"
#include "vmm/opts.h"
#include "vmm/panic.h"
#include "vmm/virtio.h"
#include "vmm/vm.h"

extern const struct device_class console_class;

#define CONSOLE_ID  3
#define MAX_PORTS   (VIRTIO_QUEUES / 2 - 1)
#define QUEUE_SIZE  128
#define CONTROL_RX  2
#define CONTROL_TX  3
#define NAME_MAX_   64
#define FIFO        1024
#define TX_CHUNK    4096
#define TX_MAX      (1u << 20)  /* bytes of one chain that are looked at: more than any reader gets to see */
#define TURN_CHAINS 128         /* per queue and turn; a driver that never stops shares the loop */
#define FLUSH_MS    200         /* last words, on the way out */

/* For the driver, in the order in which they are sent. */
enum pending { SEND_ADD = 1, SEND_CONSOLE = 2, SEND_RESIZE = 4, SEND_NAME = 8, SEND_OPEN = 16 };

struct console;

struct port {
	/* const after build */
	struct console *con;
	uint16_t id;
	bool is_console;                /* else named */
	char name[NAME_MAX_];           /* "" for a console */
	char label[32];                 /* "hvc0": for messages */
	struct chardev *host;           /* NULL: no such port */
	struct chardev_user user;
	struct panic_watch panic;

	/* home loop */
	bool ready, guest_open, connected;
	unsigned pending;
	uint64_t cut;                   /* bytes past TX_MAX */
	size_t len;
	uint8_t fifo[FIFO];
};

struct console {
	struct virtio v;
	unsigned nr_ports;              /* const */
	struct port port[MAX_PORTS];
	struct loop_task again;         /* home loop: a queue had more than a turn's worth */
};

static const struct virtio_ops console_ops;

static struct console *console_of(struct virtio *v)
{
	return container_of(v, struct console, v);
}

static unsigned rx_queue(const struct port *p)
{
	return p->id ? 2u + 2 * p->id : 0;
}

static bool multiport(const struct console *con)
{
	return virtio_has(&con->v, VIRTIO_CONSOLE_F_MULTIPORT);
}

/* --- device to driver; home loop --- */

/* The fifo into the driver's buffers. */
static void send_input(struct port *p)
{
	struct virtq *q = p->con->v.vq[rx_queue(p)];
	unsigned n = 0;
	VIRTQ_CHAIN(c);

	while (q && p->len && n < TURN_CHAINS && virtq_pop(q, &c) > 0) {
		size_t done = iov_write(&c.in, p->fifo, p->len);

		p->len -= done;
		memmove(p->fifo, p->fifo + done, p->len);
		virtq_push(q, c.head, (uint32_t)done);
		n++;
	}
	if (n == TURN_CHAINS)
		loop_post(p->con->v.home, &p->con->again);
}

static size_t port_room(struct chardev_user *u)
{
	struct port *p = container_of(u, struct port, user);

	return p->guest_open && p->con->v.vq[rx_queue(p)] ? sizeof(p->fifo) - p->len : 0;
}

static void port_input(struct chardev_user *u, const uint8_t *buf, size_t len)
{
	struct port *p = container_of(u, struct port, user);

	memcpy(p->fifo + p->len, buf, len);
	p->len += len;
	send_input(p);
}

static void set_config_size(struct console *con, bool tell)
{
	struct virtio_console_config cfg = { 0 };
	uint16_t cols, rows;

	if (!con->port[0].host || !chardev_size(con->port[0].host, &cols, &rows))
		return;
	cfg.cols = htole16(cols);
	cfg.rows = htole16(rows);
	virtio_config_set(&con->v, 0, &cfg, offsetof(struct virtio_console_config, max_nr_ports));
	if (tell)
		virtio_config_changed(&con->v);
}

/* One message; what follows the header depends on the event. */
static size_t control_message(struct port *p, unsigned what, uint8_t *buf, size_t size)
{
	struct virtio_console_control h = { .id = htole32(p->id) };
	size_t extra = 0;
	uint16_t dim[2] = { 0 };

	switch ((enum pending)what) {
	case SEND_ADD:
		h.event = htole16(VIRTIO_CONSOLE_PORT_ADD);
		break;
	case SEND_CONSOLE:
		h.event = htole16(VIRTIO_CONSOLE_CONSOLE_PORT);
		h.value = htole16(1);
		break;
	case SEND_RESIZE:
		h.event = htole16(VIRTIO_CONSOLE_RESIZE);
		chardev_size(p->host, &dim[0], &dim[1]);
		dim[0] = htole16(dim[0]);
		dim[1] = htole16(dim[1]);
		memcpy(buf + sizeof(h), dim, extra = sizeof(dim));
		break;
	case SEND_NAME:
		h.event = htole16(VIRTIO_CONSOLE_PORT_NAME);
		h.value = htole16(1);
		extra = MIN(strlen(p->name), size - sizeof(h));
		memcpy(buf + sizeof(h), p->name, extra);
		break;
	case SEND_OPEN:
		h.event = htole16(VIRTIO_CONSOLE_PORT_OPEN);
		h.value = htole16(p->connected);
		break;
	}
	memcpy(buf, &h, sizeof(h));
	return sizeof(h) + extra;
}

/* As much of what is pending as the driver has room for. */
static void send_control(struct console *con)
{
	struct virtq *q = multiport(con) ? con->v.vq[CONTROL_RX] : NULL;
	VIRTQ_CHAIN(c);

	for (unsigned i = 0; q && i < con->nr_ports; i++) {
		struct port *p = &con->port[i];

		while (p->pending) {
			unsigned what = p->pending & -p->pending;
			uint8_t buf[sizeof(struct virtio_console_control) + NAME_MAX_];

			if (virtq_pop(q, &c) <= 0)
				return;
			p->pending &= ~what;
			virtq_push(q, c.head, (uint32_t)iov_write(&c.in, buf,
						      control_message(p, what, buf, sizeof(buf))));
		}
	}
}

static void port_event(struct chardev_user *u, bool connected)
{
	struct port *p = container_of(u, struct port, user);

	p->connected = connected;
	if (p->ready) {
		p->pending |= SEND_OPEN;
		send_control(p->con);
	}
}

static void port_resized(struct chardev_user *u)
{
	struct port *p = container_of(u, struct port, user);
	struct console *con = p->con;

	if (p->id == 0)
		set_config_size(con, virtio_has(&con->v, VIRTIO_CONSOLE_F_SIZE));
	if (p->guest_open && p->is_console && virtio_has(&con->v, VIRTIO_CONSOLE_F_SIZE)) {
		p->pending |= SEND_RESIZE;
		send_control(con);
	}
}

/* --- driver to device; home loop --- */

static void write_out(struct port *p, struct iov_view *out)
{
	uint8_t buf[TX_CHUNK];
	size_t left = MIN(out->len, TX_MAX);

	p->cut += out->len - left;
	while (left) {
		size_t n = iov_read(out, buf, MIN(left, sizeof(buf)));

		chardev_write(p->host, buf, n);
		left -= n;
	}
}

static void take_output(struct port *p)
{
	struct virtq *q = p->con->v.vq[rx_queue(p) + 1];
	unsigned n = 0;
	VIRTQ_CHAIN(c);

	while (q && n < TURN_CHAINS && virtq_pop(q, &c) > 0) {
		write_out(p, &c.out);
		virtq_push(q, c.head, 0);
		n++;
	}
	if (n == TURN_CHAINS)
		loop_post(p->con->v.home, &p->con->again);
}

static void open_port(struct port *p, bool open)
{
	p->guest_open = open;
	if (open)
		chardev_more(p->host);
	else
		p->len = 0;             /* nobody is left to read it */
}

static void port_ready(struct port *p)
{
	p->ready = true;
	p->pending |= SEND_OPEN | (p->is_console ? SEND_CONSOLE : SEND_NAME);
	if (p->is_console && virtio_has(&p->con->v, VIRTIO_CONSOLE_F_SIZE))
		p->pending |= SEND_RESIZE;
}

/* virtio 1.2, 5.3.6.2. What makes no sense is ignored. */
static void control(struct console *con, const struct virtio_console_control *h)
{
	uint32_t id = le32toh(h->id);
	uint16_t value = le16toh(h->value);
	struct port *p = id < con->nr_ports && con->port[id].host ? &con->port[id] : NULL;

	switch (le16toh(h->event)) {
	case VIRTIO_CONSOLE_DEVICE_READY:
		for (unsigned i = 0; value && i < con->nr_ports; i++)
			if (con->port[i].host)
				con->port[i].pending |= SEND_ADD;
		break;
	case VIRTIO_CONSOLE_PORT_READY:
		if (p && value)
			port_ready(p);
		break;
	case VIRTIO_CONSOLE_PORT_OPEN:
		if (p)
			open_port(p, value);
		break;
	}
}

static void take_control(struct console *con)
{
	struct virtq *q = con->v.vq[CONTROL_TX];
	struct virtio_console_control h;
	unsigned n = 0;
	VIRTQ_CHAIN(c);

	while (q && n < TURN_CHAINS && virtq_pop(q, &c) > 0) {
		if (IOV_GET(&c.out, &h) && multiport(con))
			control(con, &h);
		virtq_push(q, c.head, 0);
		n++;
	}
	if (n == TURN_CHAINS)
		loop_post(con->v.home, &con->again);
	send_control(con);
}

static void serve_port(struct port *p, bool output)
{
	if (!p->host)
		return;
	if (output) {
		take_output(p);
		return;
	}
	send_input(p);
	if (p->len < sizeof(p->fifo))
		chardev_more(p->host);
}

static void console_notify(struct virtio *v, struct virtq *q)
{
	struct console *con = console_of(v);
	unsigned qi = virtq_index(q);

	ON_LOOP(v->home);
	if (qi == CONTROL_RX)
		send_control(con);
	else if (qi == CONTROL_TX)
		take_control(con);
	else
		serve_port(&con->port[qi < 2 ? 0 : qi / 2 - 1], qi & 1);
}

static void serve_again(struct loop_task *t)
{
	struct console *con = container_of(t, struct console, again);

	for (unsigned i = 0; i < con->v.nr_queues && con->v.running; i++)
		if (con->v.vq[i])
			console_notify(&con->v, con->v.vq[i]);
}

/* virtio 1.2, 5.3.4: a byte for whoever has no queues yet. */
static void console_config_write(struct virtio *v, unsigned off, unsigned size, uint64_t val)
{
	uint8_t byte = (uint8_t)val;

	(void)size;
	if (off == offsetof(struct virtio_console_config, emerg_wr) && console_of(v)->port[0].host)
		chardev_write(console_of(v)->port[0].host, &byte, 1);
}

/* --- life --- */

static int console_start(struct virtio *v)
{
	struct console *con = console_of(v);

	ON_LOOP(v->home);
	if (!multiport(con) && con->port[0].host)
		open_port(&con->port[0], true);
	return 0;
}

static void console_stop(struct virtio *v)
{
	struct console *con = console_of(v);

	ON_LOOP(v->home);
	for (unsigned i = 0; i < con->nr_ports; i++) {
		struct port *p = &con->port[i];

		p->ready = p->guest_open = false;
		p->pending = 0;
		p->len = 0;
		if (p->is_console)
			panic_watch_reset(&p->panic);
	}
}

static void console_facts(struct virtio *v, struct facts *f)
{
	struct console *con = console_of(v);

	for (unsigned i = 0; i < con->nr_ports; i++) {
		struct port *p = &con->port[i];
		struct facts *item;

		if (!p->host)
			continue;
		item = facts_item(f, "ports");
		facts_u64(item, "id", p->id);
		if (!p->is_console)
			facts_str(item, "name", p->name);
		chardev_describe(p->host, item);
		facts_u64(item, "bytes_cut", p->cut);
	}
}

/* chardev_free() calls the loop: a serve_again() that was posted before has run when it returns. */
static void console_free(struct virtio *v)
{
	struct console *con = console_of(v);

	for (unsigned i = 0; i < con->nr_ports; i++) {
		struct port *p = &con->port[i];

		if (!p->host)
			continue;
		chardev_flush(p->host, FLUSH_MS);
		chardev_free(p->host);
		if (p->is_console)
			panic_watch_done(&p->panic);
	}
	free(con);
}

static const struct virtio_ops console_ops = {
	.name = "console",
	.id = CONSOLE_ID,
	.start = console_start,
	.stop = console_stop,
	.notify = console_notify,
	.config_write = console_config_write,
	.facts = console_facts,
	.free = console_free,
};

/* --- build; main thread --- */

/* How many consoles the command line asks for, and whether one of them has no name. */
static int count_ports(const struct vm_config *cfg, unsigned *count, bool *plain, struct error *err)
{
	*count = 0;
	for (unsigned i = 0; i < cfg->nr_devices; i++) {
		const struct device_spec *d = &cfg->devices[i];
		struct opts *o;
		int r;

		if (strcmp(d->class, console_class.name))
			continue;
		r = opts_parse(&o, d->option, d->args, console_class.implied, err);
		if (r)
			return r;
		++*count;
		*plain |= !opts_str(o, "name");
		opts_free(o);
	}
	return 0;
}

/* The device, without ports yet; on the machine, which owns it. */
static int make_console(struct vm *vm, struct opts *o, struct console **ret, struct error *err)
{
	struct virtio_console_config cfg = { 0 };
	struct console *con;
	bool plain = !opts_str(o, "name");
	unsigned ports;
	int r = count_ports(vm->cfg, &ports, &plain, err);

	if (r)
		return r;
	ports = MAX(ports, 1u) + !plain;        /* port 0 is a console, or nothing */
	if (ports > MAX_PORTS)
		return error_set(err, EINVAL, "%s: more than %u ports", opts_option(o), MAX_PORTS);
	con = calloc(1, sizeof(*con));
	if (!con)
		return error_errno(err, ENOMEM, "%s", opts_option(o));
	con->nr_ports = ports;
	con->again.fn = serve_again;
	virtio_init(&con->v, &console_ops,
		1ull << VIRTIO_CONSOLE_F_SIZE | 1ull << VIRTIO_CONSOLE_F_EMERG_WRITE |
			(uint64_t)(ports > 1) << VIRTIO_CONSOLE_F_MULTIPORT, sizeof(cfg));
	for (unsigned i = 0; i < (ports > 1 ? 2 * ports + 2 : 2); i++)
		virtio_add_queue(&con->v, QUEUE_SIZE);
	cfg.max_nr_ports = htole32(ports);
	virtio_config_set(&con->v, 0, &cfg, sizeof(cfg));
	for (unsigned i = 0; i < ports; i++)
		con->port[i] = (struct port){ .con = con, .id = (uint16_t)i };
	r = vm_add_virtio(vm, &con->v, err);
	if (r) {
		virtio_free(&con->v);
		return r;
	}
	*ret = con;
	return 0;
}

static struct console *find_console(const struct vm *vm)
{
	for (unsigned i = 0; i < vm->nr_virtio; i++)
		if (vm->virtio[i]->ops == &console_ops)
			return console_of(vm->virtio[i]);
	return NULL;
}

static int check_name(const struct console *con, const char *name, struct error *err)
{
	size_t n = strlen(name);

	if (!n || n >= NAME_MAX_)
		return error_set(err, EINVAL, "a port's name has 1 to %u characters", NAME_MAX_ - 1);
	for (size_t i = 0; i < n; i++)
		if (!isgraph((unsigned char)name[i]) || name[i] == '/')
			return error_set(err, EINVAL, "'%s' is no port name: it becomes a file name in the guest", name);
	for (unsigned i = 0; i < con->nr_ports; i++)
		if (con->port[i].host && !strcmp(con->port[i].name, name))
			return error_set(err, EEXIST, "there are two ports named '%s'", name);
	return 0;
}

/* Port 0 is kept for the first console without a name. */
static struct port *free_port(struct console *con, bool is_console)
{
	for (unsigned i = !is_console; i < con->nr_ports; i++)
		if (!con->port[i].host)
			return &con->port[i];
	return NULL;
}

static int add_port(struct vm *vm, struct console *con, const char *spec, const char *name,
	struct error *err)
{
	struct port *p = free_port(con, !name);
	int r;

	if (!p)
		return error_set(err, ENOSPC, "this machine's console has %u ports", con->nr_ports);
	r = name ? check_name(con, name, err) : 0;
	if (r)
		return r;
	snprintf(p->name, sizeof(p->name), "%s", name ? name : "");
	if (name)
		snprintf(p->label, sizeof(p->label), "port '%.20s'", name);
	else
		snprintf(p->label, sizeof(p->label), "hvc%u", p->id);
	r = chardev_open(&p->host, spec, p->label, vm->io, err);
	if (r)
		return r;
	p->is_console = !name;
	p->user = (struct chardev_user){ .room = port_room, .input = port_input, .event = port_event,
		.resized = port_resized };
	if (p->is_console) {
		panic_watch_init(&p->panic, vm, p->label);
		if (!vm->cfg->ignore_panic)
			chardev_tap(p->host, panic_watch_feed, &p->panic);
	}
	chardev_attach(p->host, &p->user);
	if (!p->id)
		set_config_size(con, false);
	return 0;
}

static int console_create(struct vm *vm, struct opts *o, struct error *err)
{
	const char *spec = opts_str(o, "chardev"), *name = opts_str(o, "name");
	struct console *con = find_console(vm);
	int r = opts_end(o, err);

	if (!r && !spec)
		r = error_set(err, EINVAL, "%s: where to: stdio, file:PATH, unix:PATH, …", opts_option(o));
	if (!r && !con)
		r = make_console(vm, o, &con, err);
	if (r)
		return r;
	r = add_port(vm, con, spec, name, err);
	if (r)
		error_prefix(err, "%s: ", opts_option(o));
	return r;
}

const struct device_class console_class = {
	.name = "console",
	.help = "stdio|file:PATH|pipe:PATH|unix:PATH|…[,name=N]: virtio console, or a port named N",
	.implied = "chardev",
	.create = console_create,
};
