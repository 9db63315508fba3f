#ifndef VMM_NET_H
#define VMM_NET_H
/*
 * A network back end is a descriptor that carries Ethernet frames: a socketpair to the NAT helper now, a
 * tap or a socket to a peer later. virtio-net moves frames between guest RAM and the descriptor through
 * the loop.
 */
#include <stdbool.h>
#include <stdint.h>
struct error;
struct facts;
struct loop;
struct opts;
struct spawner;
struct vm;

enum net_framing { NET_DATAGRAM };      /* one frame a message */

struct net_backend {
	int fd;                         /* frames; non-blocking */
	enum net_framing framing;
	bool vnet_hdr;                  /* frames carry struct virtio_net_hdr_v1 */
	uint64_t offloads;              /* virtio-net feature bits the other side can take */
	uint16_t mtu;                   /* largest IP packet it carries */
	/*
	 * Link state, set by the NIC before start(): the back end calls link(arg, up) on the NIC's home
	 * loop. On down the NIC stops using fd; on up it reads fd anew (it may be another descriptor).
	 */
	void (*link)(void *arg, bool up);
	void *link_arg;
	int  (*start)(struct net_backend *b, struct loop *home);        /* home loop; optional; 0 or -errno */
	void (*describe)(struct net_backend *b, struct facts *f);       /* main thread; forwards, restarts */
	void (*close)(struct net_backend *b);                           /* main thread, loops still run */
	void *priv;
};

/* One table line per back end in src/net/net.c. */
struct net_class {
	const char *name, *help;
	int (*prepare)(struct spawner *s, struct error *err);   /* optional: register helpers */
	int (*open)(struct net_backend *ret, struct vm *vm, struct opts *o, struct error *err);
};
/*
 * For each --net option, before spawner_seal(): register what its back end needs started. args is the
 * option's text, "user,fwd=…". 0, or -errno with words. Main thread.
 */
int net_prepare(struct spawner *s, const char *args, struct error *err);
/*
 * Open the back end named by the first part of --net ("user", the default) and read its keys. ret stays where
 * it is until close(). Main thread.
 */
int net_open(struct net_backend *ret, struct vm *vm, struct opts *o, struct error *err);
#endif
