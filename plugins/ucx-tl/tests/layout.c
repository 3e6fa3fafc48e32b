/* Prints sizes and offsets of UCX's internal structures, from the headers it is compiled with: "name value" lines, which the
 * plugin's test compares with its table. */
#include <stddef.h>
#include <stdio.h>
#include <uct/base/uct_component.h>
#include <uct/base/uct_iface.h>
#include <uct/base/uct_md.h>
#include <uct/api/v2/uct_v2.h>

#define SIZE(type) printf("sizeof(%s) %zu\n", #type, sizeof(type))
#define AT(type, member) printf("%s.%s %zu\n", #type, #member, offsetof(type, member))

int main(void)
{
    SIZE(uct_component_t);
    AT(uct_component_t, rkey_unpack);
    AT(uct_component_t, md_config);
    AT(uct_component_t, cm_config);
    AT(uct_component_t, tl_list);
    AT(uct_component_t, md_vfs_init);
    SIZE(uct_tl_t);
    AT(uct_tl_t, query_devices);
    AT(uct_tl_t, config);
    SIZE(uct_md_ops_t);
    AT(uct_md_ops_t, mem_alloc);
    AT(uct_md_ops_t, mem_reg);
    AT(uct_md_ops_t, mkey_pack);
    SIZE(uct_iface_internal_ops_t);
    AT(uct_iface_internal_ops_t, ep_invalidate);
    SIZE(uct_md_attr_t);
    AT(uct_md_attr_t, cap.flags);
    AT(uct_md_attr_t, cap.alloc_mem_types);
    AT(uct_md_attr_t, cap.access_mem_types);
    AT(uct_md_attr_t, reg_cost);
    AT(uct_md_attr_t, rkey_packed_size);
    AT(uct_md_attr_t, local_cpus);
    SIZE(ucs_config_field_t);
    AT(uct_perf_attr_t, bandwidth);
    AT(uct_perf_attr_t, latency);
    AT(uct_perf_attr_t, max_inflight_eps);
    SIZE(uct_iface_ops_t);
    AT(uct_iface_ops_t, ep_am_zcopy);
    AT(uct_iface_ops_t, ep_atomic64_fetch);
    AT(uct_iface_ops_t, ep_pending_add);
    AT(uct_iface_ops_t, ep_create);
    AT(uct_iface_ops_t, ep_destroy);
    AT(uct_iface_ops_t, iface_flush);
    AT(uct_iface_ops_t, iface_close);
    AT(uct_iface_ops_t, iface_is_reachable);
    SIZE(uct_base_iface_t);
    AT(uct_base_iface_t, am);
    SIZE(uct_base_ep_t);
    SIZE(uct_iface_attr_t);
    AT(uct_iface_attr_t, overhead);
    AT(uct_iface_attr_t, latency);
    AT(uct_iface_params_t, open_mode);
    SIZE(uct_iface_config_t);
    SIZE(uct_completion_t);
    SIZE(uct_pending_req_t);
    SIZE(uct_iov_t);
    SIZE(ucs_status_t);
    return 0;
}
