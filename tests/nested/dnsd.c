/*
 * A name server for the beds: dnsd ADDRESS PORT NAME A-RECORD answers for one name, says NXDOMAIN to the rest
 * (RFC 1035). It goes to the background once its socket is bound, so whoever starts it can go on at once.
 */
#include <arpa/inet.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define HEADER      12
#define MESSAGE_MAX 512
#define TYPE_A      1
#define NXDOMAIN    3

static const char *name;
static struct in_addr record;

/* Decode the question's name into dotted form. Returns the offset after it, or 0. */
static size_t read_name(const unsigned char *msg, size_t len, char *out)
{
	size_t at = HEADER, n = 0;

	while (at < len && msg[at]) {
		size_t label = msg[at++];

		if (label > 63 || label >= len - at)
			return 0;
		memcpy(out + n, msg + at, label);
		at += label;
		n += label;
		out[n++] = '.';
	}
	out[n ? n - 1 : 0] = '\0';
	return at < len ? at + 1 : 0;
}

/* Turn the query into its answer, in place. Returns the length, 0: say nothing. */
static size_t answer(unsigned char *msg, size_t len)
{
	char asked[MESSAGE_MAX];
	unsigned char rr[] = { 0xc0, HEADER, 0, TYPE_A, 0, 1, 0, 0, 0, 60, 0, 4 };
	size_t end;
	bool mine;

	if (len < HEADER || (msg[2] & 0x80))
		return 0;
	end = read_name(msg, len, asked);
	if (!end || len - end < 4)
		return 0;
	mine = !strcasecmp(asked, name);
	end += 4;
	msg[2] |= 0x84;                         /* a response, authoritative */
	msg[3] = mine ? 0x80 : 0x80 | NXDOMAIN;
	memset(msg + 6, 0, HEADER - 6);         /* no records but what follows */
	if (!mine || msg[end - 4] || msg[end - 3] != TYPE_A || end + sizeof(rr) + 4 > MESSAGE_MAX)
		return end;
	msg[7] = 1;
	memcpy(msg + end, rr, sizeof(rr));
	memcpy(msg + end + sizeof(rr), &record, 4);
	return end + sizeof(rr) + 4;
}

static void serve(int fd)
{
	unsigned char msg[MESSAGE_MAX];
	struct sockaddr_in peer;

	for (;;) {
		socklen_t peer_len = sizeof(peer);
		ssize_t len = recvfrom(fd, msg, sizeof(msg), 0, (struct sockaddr *)&peer, &peer_len);
		size_t out = len > 0 ? answer(msg, (size_t)len) : 0;

		if (out)
			sendto(fd, msg, out, 0, (struct sockaddr *)&peer, peer_len);
	}
}

int main(int argc, char **argv)
{
	struct sockaddr_in here = { .sin_family = AF_INET };
	int fd;

	if (argc != 5 || !inet_aton(argv[1], &here.sin_addr) || !inet_aton(argv[4], &record)) {
		fprintf(stderr, "usage: dnsd ADDRESS PORT NAME A-RECORD\n");
		return 2;
	}
	here.sin_port = htons((uint16_t)atoi(argv[2]));
	name = argv[3];
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0 || bind(fd, (struct sockaddr *)&here, sizeof(here)) < 0) {
		perror("dnsd");
		return 1;
	}
	if (daemon(0, 0) < 0) {
		perror("dnsd");
		return 1;
	}
	serve(fd);
}
