// What this library was built from: build.py's hash of the sources and flags, by which library.py knows its own.
#if !defined(BRLITE_FINGERPRINT)
#define BRLITE_FINGERPRINT "unknown"
#endif

extern "C" __attribute__((visibility("default"))) const char* brlite_fingerprint(void) { return BRLITE_FINGERPRINT; }
