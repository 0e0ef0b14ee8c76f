package crayon.app.benchmark

import android.annotation.TargetApi
import android.content.Context
import android.content.Intent
import android.content.IntentFilter
import android.os.BatteryManager
import android.os.Build
import android.os.PowerManager
import crayon.runtime.profile.LinuxSensors
import kotlin.math.abs

/** What Android tells beside the files of Linux, few of which an app may read: the battery's temperature and power, and the thermal status. */
class PhoneSensors(private val context: Context) : LinuxSensors() {
    private val batteries = checkNotNull(context.getSystemService(BatteryManager::class.java))
    private val manager = checkNotNull(context.getSystemService(PowerManager::class.java))

    override fun temperature(): Map<String, Double> =
        super.temperature() + listOfNotNull(battery(BatteryManager.EXTRA_TEMPERATURE)?.let { "battery" to it / 10.0 })

    /** Only while the battery is discharging: at the cable, its current says nothing about what is used. */
    override fun power(): Map<String, Double> {
        val volts = battery(BatteryManager.EXTRA_VOLTAGE)?.let { it / 1e3 }
        val microamperes = batteries.getIntProperty(BatteryManager.BATTERY_PROPERTY_CURRENT_NOW)
        val known = volts != null && microamperes != Int.MIN_VALUE && microamperes != 0 && !batteries.isCharging
        return super.power() + if (known) mapOf("battery" to abs(microamperes) / 1e6 * volts) else emptyMap()
    }

    override fun throttled(): Map<String, Long> =
        super.throttled() + if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.Q) mapOf("thermal status" to thermalStatus()) else emptyMap()

    @TargetApi(Build.VERSION_CODES.Q)
    private fun thermalStatus(): Long = manager.currentThermalStatus.toLong()

    private fun battery(extra: String): Int? {
        val state: Intent = context.registerReceiver(null, IntentFilter(Intent.ACTION_BATTERY_CHANGED)) ?: return null
        return state.getIntExtra(extra, -1).takeIf { it > 0 }
    }
}
