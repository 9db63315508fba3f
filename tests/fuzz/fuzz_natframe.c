/*
 * The NAT helper's door: frames of a guest, each two bytes of length (big endian) and the bytes. What comes
 * through must be what libslirp is promised: headers inside lengths inside the frame, and no fragments.
 */
#include <assert.h>
#include <stdlib.h>
#include <string.h>
#include "net/nat/filter.h"
#include "net/nat/reassemble.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void check(const uint8_t *f, size_t len)
{
	size_t hlen = (size_t)(f[14] & 15) * 4, total = (size_t)f[16] << 8 | f[17];

	assert(hlen >= 20 && hlen <= total && total <= len - 14 && len <= 14 + 65535);
	assert(!(f[20] & 0x3f) && !f[21]);
	assert(f[23] == 1 || f[23] == 6 || f[23] == 17);
	assert(f[30] != 127 && f[30] != 0 && (f[30] != 169 || f[31] != 254));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct reassemble r = { 0 };

	while (size >= 2) {
		size_t len = (size_t)data[0] << 8 | data[1], whole_len;
		const uint8_t *whole;
		uint8_t *frame;

		data += 2;
		size -= 2;
		if (len > size)
			len = size;
		frame = malloc(len ? len : 1);
		if (!frame)
			break;
		memcpy(frame, data, len);
		data += len;
		size -= len;
		whole_len = len;
		if (nat_filter(frame, len, false) == NAT_PASS && frame[12] == 8 && frame[13] == 0) {
			whole = reassemble(&r, frame, &whole_len);
			if (whole && nat_filter(whole, whole_len, false) == NAT_PASS)
				check(whole, whole_len);
		}
		free(frame);
	}
	reassemble_done(&r);
	return 0;
}
