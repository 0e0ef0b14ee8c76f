package crayon.app

import android.annotation.TargetApi
import android.app.Notification
import android.app.NotificationChannel
import android.app.NotificationManager
import android.app.PendingIntent
import android.app.Service
import android.content.Intent
import android.content.pm.ServiceInfo
import android.os.Build
import android.os.IBinder
import crayon.app.chat.ChatActivity
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.SupervisorJob
import kotlinx.coroutines.cancel
import kotlinx.coroutines.flow.filterNotNull
import kotlinx.coroutines.launch

/** Runs the task of [Work] in the foreground, under a notification that can stop it, and ends with it. */
class WorkService : Service() {
    private val scope = CoroutineScope(SupervisorJob() + Dispatchers.Default)
    private val notifications by lazy { checkNotNull(getSystemService(NotificationManager::class.java)) }

    override fun onBind(intent: Intent?): IBinder? = null

    override fun onCreate() {
        super.onCreate()
        notifications.createNotificationChannel(
            NotificationChannel(CHANNEL, getString(R.string.work_channel), NotificationManager.IMPORTANCE_LOW),
        )
        scope.launch {
            parts.work.running
                .filterNotNull()
                .collect { notifications.notify(NOTIFICATION, notification(it)) }
        }
    }

    override fun onStartCommand(intent: Intent?, flags: Int, startId: Int): Int {
        val kind = Kind.entries.find { it.name == intent?.getStringExtra(KIND) } ?: Kind.ANSWER
        toForeground(kind)
        if (intent?.action == STOP) parts.work.cancel()
        scope.launch { parts.work.run() }.invokeOnCompletion { stopSelf(startId) }
        return START_NOT_STICKY
    }

    /** The system lets a download run for six hours a day; then it wants this to end. */
    override fun onTimeout(startId: Int, fgsType: Int) {
        parts.work.cancel()
        stopSelf()
    }

    override fun onDestroy() {
        scope.cancel()
        notifications.cancel(NOTIFICATION)
        super.onDestroy()
    }

    private fun toForeground(kind: Kind) {
        val shown = notification(Running(kind))
        if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.UPSIDE_DOWN_CAKE) typed(shown, kind) else startForeground(NOTIFICATION, shown)
    }

    @TargetApi(Build.VERSION_CODES.UPSIDE_DOWN_CAKE)
    private fun typed(shown: Notification, kind: Kind) {
        val type = when (kind) {
            Kind.INSTALL, Kind.CUSTOMIZE -> ServiceInfo.FOREGROUND_SERVICE_TYPE_DATA_SYNC
            Kind.ANSWER, Kind.BENCHMARK -> ServiceInfo.FOREGROUND_SERVICE_TYPE_SPECIAL_USE
        }
        startForeground(NOTIFICATION, shown, type)
    }

    private fun notification(running: Running): Notification {
        val open = PendingIntent.getActivity(this, 0, Intent(this, ChatActivity::class.java), PendingIntent.FLAG_IMMUTABLE)
        val stop = Intent(this, WorkService::class.java).setAction(STOP).putExtra(KIND, running.kind.name)
        val stopping = PendingIntent.getService(this, 0, stop, PendingIntent.FLAG_IMMUTABLE or PendingIntent.FLAG_UPDATE_CURRENT)
        return Notification
            .Builder(this, CHANNEL)
            .setSmallIcon(R.drawable.pencil)
            .setContentTitle(getString(running.kind.title))
            .setContentIntent(open)
            .setOngoing(true)
            .setProgress(100, running.percent ?: 0, running.percent == null)
            .addAction(Notification.Action.Builder(null, getString(R.string.stop), stopping).build())
            .build()
    }

    companion object {
        const val KIND = "kind"
        const val STOP = "crayon.app.STOP"
        private const val CHANNEL = "work"
        private const val NOTIFICATION = 1
    }
}

/** A task's name. */
val Kind.title: Int
    get() = when (this) {
        Kind.ANSWER -> R.string.work_answer
        Kind.INSTALL -> R.string.work_install
        Kind.CUSTOMIZE -> R.string.work_customize
        Kind.BENCHMARK -> R.string.work_benchmark
    }
