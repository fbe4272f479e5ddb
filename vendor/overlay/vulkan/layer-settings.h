// What ggml's Vulkan backend takes of VK_EXT_layer_settings, for headers that are older than it (Vulkan 1.3.268; Debian 12 has
// 1.3.239). It is included in front of ggml-vulkan.cpp.
#pragma once

// with what is defined there before
#include "ggml-vulkan-types.h"

#include <vector>

#ifndef VK_EXT_layer_settings

namespace vk {

enum class LayerSettingTypeEXT { eBool32 = 0 };

struct LayerSettingEXT {
    const char *        pLayerName;
    const char *        pSettingName;
    LayerSettingTypeEXT type;
    uint32_t            valueCount;
    const void *        pValues;
};

struct LayerSettingsCreateInfoEXT {
    VkStructureType         sType = (VkStructureType) 1000496000;
    const void *            pNext = nullptr;
    uint32_t                settingCount;
    const LayerSettingEXT * pSettings;

    explicit LayerSettingsCreateInfoEXT(const std::vector<LayerSettingEXT> & settings) : settingCount(settings.size()), pSettings(settings.data()) {}
};

} // namespace vk

#endif
