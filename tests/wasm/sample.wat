;; The sample plugin of `src/lib.rs` once more, in the text form of WebAssembly, so that what the gateway promises of modules
;; is tested where Rust's target wasm32-wasip1 cannot be had. It does the same, asked for by the same fields.
;;
;; Memory: texts up to 1024; 1024 and 1028 are where the host writes a pointer and a length, 1032 where it writes a token;
;; configurations of root contexts from 2048, 256 bytes each; the root of each context from 32768; the heap from 65536.
(module
  (import "env" "proxy_get_buffer_bytes" (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value" (func $get_field (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $set_field (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_configuration" (func $get_configuration (param i32 i32) (result i32)))
  (import "env" "proxy_get_property" (func $get_property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_set_property" (func $set_property (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_send_local_response" (func $answer (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_http_call" (func $call_out (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_continue_stream" (func $resume (param i32) (result i32)))
  (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))

  (memory (export "memory") 4)
  (data (i32.const 16) "x-mark")
  (data (i32.const 24) "x-from")
  (data (i32.const 32) "remote_addr")
  (data (i32.const 48) "x-block")
  (data (i32.const 56) "x-rewrite")
  (data (i32.const 72) "x-body")
  (data (i32.const 80) "x-ask")
  (data (i32.const 88) "x-spin")
  (data (i32.const 96) "x-panic")
  (data (i32.const 104) "x-eat")
  (data (i32.const 112) "x-sample")
  (data (i32.const 120) "x-asked")
  (data (i32.const 128) ":path")
  (data (i32.const 136) "/rewritten?by=wasm")
  (data (i32.const 160) ":status")
  (data (i32.const 168) "none")
  (data (i32.const 176) "wasm_process_req_body")
  (data (i32.const 200) "true")
  (data (i32.const 208) "blocked")
  (data (i32.const 216) "sample saw the end with ")
  (data (i32.const 240) "one")
  ;; Pairs in the form of the ABI: x-by, and the head of a call.
  (data (i32.const 248) "\01\00\00\00\04\00\00\00\06\00\00\00x-by\00sample\00")
  (data (i32.const 272) "\03\00\00\00\07\00\00\00\03\00\00\00\05\00\00\00\06\00\00\00\0a\00\00\00\0a\00\00\00:method\00GET\00:path\00/asked\00:authority\00asked.test\00")

  (global $heap (mut i32) (i32.const 65536))

  ;; Memory for what the host hands over; taken back when the next request begins.
  (func $allocate (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $place i32)
    (local.set $place (global.get $heap))
    (global.set $heap (i32.and (i32.add (i32.add (global.get $heap) (local.get $size)) (i32.const 7)) (i32.const -8)))
    (block $enough
      (loop $more
        (br_if $enough (i32.le_u (global.get $heap) (i32.mul (memory.size) (i32.const 65536))))
        (drop (memory.grow (i32.const 1)))
        (br $more)))
    (local.get $place))

  (func (export "proxy_abi_version_0_2_0"))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))

  ;; Where the root of a context is written down.
  (func $root_at (param $context i32) (result i32)
    (i32.add (i32.const 32768) (i32.mul (i32.and (local.get $context) (i32.const 4095)) (i32.const 4))))

  ;; Where the configuration of a root stands: its length, and its text.
  (func $configuration_at (param $root i32) (result i32)
    (i32.add (i32.const 2048) (i32.mul (i32.rem_u (local.get $root) (i32.const 100)) (i32.const 256))))

  (func (export "proxy_on_context_create") (param $context i32) (param $root i32)
    (i32.store (call $root_at (local.get $context)) (local.get $root)))

  (func (export "proxy_on_configure") (param $root i32) (param $size i32) (result i32)
    (local $at i32) (local $length i32)
    (local.set $at (call $configuration_at (local.get $root)))
    (drop (call $get_configuration (i32.const 1024) (i32.const 1028)))
    (local.set $length (i32.load (i32.const 1028)))
    (if (i32.gt_u (local.get $length) (i32.const 252)) (then (return (i32.const 0))))
    (i32.store (local.get $at) (local.get $length))
    (memory.copy (i32.add (local.get $at) (i32.const 4)) (i32.load (i32.const 1024)) (local.get $length))
    (i32.const 1))

  ;; Whether the request has a field; its value stands at 1024 and 1028 then.
  (func $has (param $name i32) (param $length i32) (result i32)
    (i32.eqz (call $get_field (i32.const 0) (local.get $name) (local.get $length) (i32.const 1024) (i32.const 1028))))

  ;; Sets a field of the request, or of the answer with 2.
  (func $set (param $map i32) (param $name i32) (param $length i32) (param $value i32) (param $value_length i32)
    (drop (call $set_field
      (local.get $map) (local.get $name) (local.get $length) (local.get $value) (local.get $value_length))))

  (func (export "proxy_on_request_headers") (param $context i32) (param $count i32) (param $end i32) (result i32)
    (local $configuration i32)
    (global.set $heap (i32.const 65536))
    (local.set $configuration (call $configuration_at (i32.load (call $root_at (local.get $context)))))
    (call $set (i32.const 0) (i32.const 16) (i32.const 6)
      (i32.add (local.get $configuration) (i32.const 4)) (i32.load (local.get $configuration)))
    (if (i32.eqz (call $get_property (i32.const 32) (i32.const 11) (i32.const 1024) (i32.const 1028)))
      (then
        (call $set (i32.const 0) (i32.const 24) (i32.const 6) (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))))
    (if (call $has (i32.const 48) (i32.const 7))
      (then
        (drop (call $answer (i32.const 403) (i32.const 0) (i32.const 0)
          (i32.const 208) (i32.const 7) (i32.const 248) (i32.const 24) (i32.const -1)))
        (return (i32.const 1))))
    (if (call $has (i32.const 56) (i32.const 9))
      (then (call $set (i32.const 0) (i32.const 128) (i32.const 5) (i32.const 136) (i32.const 18))))
    (if (call $has (i32.const 72) (i32.const 6))
      (then (drop (call $set_property (i32.const 176) (i32.const 21) (i32.const 200) (i32.const 4)))))
    (if (call $has (i32.const 80) (i32.const 5))
      (then
        (return (i32.eqz (call $call_out
          (i32.load (i32.const 1024)) (i32.load (i32.const 1028)) (i32.const 272) (i32.const 75)
          (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 2000) (i32.const 1032))))))
    (if (call $has (i32.const 96) (i32.const 7)) (then (unreachable)))
    (if (call $has (i32.const 104) (i32.const 5))
      (then (loop $eat (drop (memory.grow (i32.const 16))) (br $eat))))
    (if (call $has (i32.const 88) (i32.const 6))
      (then (loop $spin (br $spin))))
    (i32.const 0))

  (func (export "proxy_on_http_call_response") (param $context i32) (param $token i32) (param i32 i32 i32)
    (if (call $get_field (i32.const 6) (i32.const 160) (i32.const 7) (i32.const 1024) (i32.const 1028))
      (then (call $set (i32.const 0) (i32.const 120) (i32.const 7) (i32.const 168) (i32.const 4)))
      (else
        (call $set (i32.const 0) (i32.const 120) (i32.const 7) (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))))
    (drop (call $resume (i32.const 0))))

  (func (export "proxy_on_request_body") (param $context i32) (param $size i32) (param $end i32) (result i32)
    (local $at i32) (local $last i32) (local $byte i32)
    (if (call $get_buffer (i32.const 0) (i32.const 0) (local.get $size) (i32.const 1024) (i32.const 1028))
      (then (return (i32.const 0))))
    (local.set $at (i32.load (i32.const 1024)))
    (local.set $last (i32.add (local.get $at) (i32.load (i32.const 1028))))
    (block $done
      (loop $next
        (br_if $done (i32.ge_u (local.get $at) (local.get $last)))
        (local.set $byte (i32.load8_u (local.get $at)))
        ;; a to z
        (if (i32.lt_u (i32.sub (local.get $byte) (i32.const 97)) (i32.const 26))
          (then (i32.store8 (local.get $at) (i32.sub (local.get $byte) (i32.const 32)))))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next)))
    (drop (call $set_buffer (i32.const 0) (i32.const 0) (local.get $size)
      (i32.load (i32.const 1024)) (i32.load (i32.const 1028))))
    (i32.const 0))

  (func (export "proxy_on_response_headers") (param $context i32) (param $count i32) (param $end i32) (result i32)
    (call $set (i32.const 2) (i32.const 112) (i32.const 8) (i32.const 240) (i32.const 3))
    (i32.const 0))

  (func (export "proxy_on_log") (param $context i32)
    (local $line i32)
    (drop (call $get_field (i32.const 2) (i32.const 160) (i32.const 7) (i32.const 1024) (i32.const 1028)))
    (local.set $line (call $allocate (i32.add (i32.const 24) (i32.load (i32.const 1028)))))
    (memory.copy (local.get $line) (i32.const 216) (i32.const 24))
    (memory.copy (i32.add (local.get $line) (i32.const 24))
      (i32.load (i32.const 1024)) (i32.load (i32.const 1028)))
    (drop (call $log (i32.const 3) (local.get $line)
      (i32.add (i32.const 24) (i32.load (i32.const 1028)))))))
